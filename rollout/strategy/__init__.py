"""The choice of what each decode step runs: which drafter, how deep and how wide."""

from paceline.rollout.strategy.arms import default_arms
from paceline.rollout.strategy.bandit import BanditSelector
from paceline.rollout.strategy.budgets import BUDGETS
from paceline.rollout.strategy.cost_model import CostModel
from paceline.rollout.strategy.strategy import PLAIN, FixedSelector, Selector, StepFeedback, Strategy

__all__ = [
    "BUDGETS",
    "PLAIN",
    "BanditSelector",
    "CostModel",
    "FixedSelector",
    "Selector",
    "StepFeedback",
    "Strategy",
    "default_arms",
]
