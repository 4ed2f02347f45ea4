"""Drafters, by name. A new one is one file and one line here."""

from rollout.drafters.base import DraftContext, Drafter
from rollout.drafters.eagle3 import Eagle3Drafter
from rollout.drafters.suffix import SuffixDrafter

DRAFTERS: dict[str, type] = {"suffix": SuffixDrafter, "eagle3": Eagle3Drafter}

__all__ = ["DRAFTERS", "DraftContext", "Drafter", "Eagle3Drafter", "SuffixDrafter"]
