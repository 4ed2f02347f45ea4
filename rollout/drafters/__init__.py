"""Drafters, by name. A new one is one file and one line here."""

from rollout.drafters.base import DraftContext, Drafter, VerifiedStep
from rollout.drafters.clasp import ClaspDrafter
from rollout.drafters.composite import CompositeDrafter
from rollout.drafters.consensus import ConsensusDrafter
from rollout.drafters.draft_model import DraftModelDrafter
from rollout.drafters.eagle3 import Eagle3Drafter
from rollout.drafters.growing import DraftRules
from rollout.drafters.ngram import NgramDrafter
from rollout.drafters.stand import StandDrafter
from rollout.drafters.suffix import SuffixDrafter
from rollout.drafters.token_recycling import TokenRecyclingDrafter

DRAFTERS: dict[str, type] = {
    "suffix": SuffixDrafter,
    "ngram": NgramDrafter,
    "consensus": ConsensusDrafter,
    "recycling": TokenRecyclingDrafter,
    "stand": StandDrafter,
    "eagle3": Eagle3Drafter,
    "composite": CompositeDrafter,
    "clasp": ClaspDrafter,
    "draft_model": DraftModelDrafter,
}

__all__ = [
    "DRAFTERS",
    "ClaspDrafter",
    "CompositeDrafter",
    "ConsensusDrafter",
    "DraftContext",
    "DraftModelDrafter",
    "DraftRules",
    "Drafter",
    "Eagle3Drafter",
    "NgramDrafter",
    "StandDrafter",
    "SuffixDrafter",
    "TokenRecyclingDrafter",
    "VerifiedStep",
]
