"""What to run at each step."""

from rollout.strategy.elastic import ElasticSelector
from rollout.strategy.strategy import PLAIN, FixedSelector, Selector, StepFeedback, Strategy

__all__ = ["PLAIN", "ElasticSelector", "FixedSelector", "Selector", "StepFeedback", "Strategy"]
