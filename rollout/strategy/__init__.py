"""What to run at each step."""

from rollout.strategy.bandit import BanditSelector, default_arms
from rollout.strategy.budgets import BUDGETS
from rollout.strategy.cost_model import CostModel
from rollout.strategy.strategy import PLAIN, FixedSelector, Selector, StepFeedback, Strategy

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
