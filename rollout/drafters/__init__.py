"""Drafters by name.

A new drafter is one file and one line in `DRAFTERS`. Its class implements `Drafter`; one that needs arguments
has a class method ``build(host: DrafterHost, parts: DrafterParts)``, see `paceline.rollout.drafters.parts`.
"""

from paceline.rollout.drafters.base import DraftContext, Drafter, VerifiedStep
from paceline.rollout.drafters.clasp import ClaspDrafter
from paceline.rollout.drafters.composite import CompositeDrafter
from paceline.rollout.drafters.consensus import ConsensusDrafter
from paceline.rollout.drafters.draft_model import DraftModelDrafter
from paceline.rollout.drafters.eagle3 import Eagle3Drafter
from paceline.rollout.drafters.model_drafts import DraftRules
from paceline.rollout.drafters.ngram import NgramDrafter
from paceline.rollout.drafters.parallel import ParallelDrafter
from paceline.rollout.drafters.stand import StandDrafter
from paceline.rollout.drafters.suffix import SuffixDrafter
from paceline.rollout.drafters.token_recycling import TokenRecyclingDrafter

DRAFTERS: dict[str, type] = {
    "suffix": SuffixDrafter,
    "ngram": NgramDrafter,
    "consensus": ConsensusDrafter,
    "recycling": TokenRecyclingDrafter,
    "stand": StandDrafter,
    "eagle3": Eagle3Drafter,
    "parallel": ParallelDrafter,
    "composite": CompositeDrafter,
    "clasp": ClaspDrafter,
    "draft_model": DraftModelDrafter,
}

# drafters that cannot be built before there are EAGLE-3 weights
EAGLE3_DRAFTERS = frozenset({"eagle3", "parallel", "composite"})

__all__ = [
    "DRAFTERS",
    "EAGLE3_DRAFTERS",
    "ClaspDrafter",
    "CompositeDrafter",
    "ConsensusDrafter",
    "DraftContext",
    "DraftModelDrafter",
    "DraftRules",
    "Drafter",
    "Eagle3Drafter",
    "NgramDrafter",
    "ParallelDrafter",
    "StandDrafter",
    "SuffixDrafter",
    "TokenRecyclingDrafter",
    "VerifiedStep",
]
