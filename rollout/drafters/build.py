"""Builds registered drafters for an engine."""

from __future__ import annotations

from dataclasses import dataclass, field

from transformers import PreTrainedModel

from paceline.rollout.drafters.base import Drafter
from paceline.rollout.drafters.clasp import ClaspDrafter
from paceline.rollout.drafters.composite import CompositeDrafter
from paceline.rollout.drafters.consensus import ConsensusDrafter
from paceline.rollout.drafters.draft_model import DraftModelDrafter
from paceline.rollout.drafters.eagle3 import Eagle3Drafter
from paceline.rollout.drafters.eagle3_model import Eagle3Model
from paceline.rollout.drafters.model_drafts import DraftRules
from paceline.rollout.drafters.ngram import NgramDrafter
from paceline.rollout.drafters.stand import StandDrafter
from paceline.rollout.drafters.suffix import SuffixDrafter
from paceline.rollout.drafters.token_recycling import TokenRecyclingDrafter
from paceline.rollout.engine.engine import RolloutEngine


@dataclass(slots=True)
class DrafterParts:
    """The parts and settings from which drafters are built.

    Attributes:
        rules: How model-based drafters make their drafts.
        eagle3: Weights of the EAGLE-3 drafter.
        eagle3_window: Minimum number of tokens that the EAGLE-3 drafter attends to; None for all.
        draft_model: Model of the ``draft_model`` drafter.
        composite_match: Length in tokens of a suffix match from which the composite drafter uses it.
        clasp_skipped: Share of the layers that CLaSp skips.
    """

    rules: DraftRules = field(default_factory=DraftRules)
    eagle3: Eagle3Model | None = None
    eagle3_window: int | None = None
    draft_model: PreTrainedModel | None = None
    composite_match: int = 5
    clasp_skipped: float = 0.4


def build_drafter(name: str, engine: RolloutEngine, parts: DrafterParts) -> Drafter:
    """Builds a drafter that fits the engine, for `RolloutEngine.add_drafter`.

    Raises:
        ValueError: The name is unknown, or a part that the drafter needs is missing.
    """
    runner = engine.runner
    slots, dtype = engine.scheduler.slots, runner.view.dtype
    capacity = engine.capacity_for(engine.max_context, engine.max_nodes)
    match name:
        case "suffix":
            return SuffixDrafter()
        case "ngram":
            return NgramDrafter()
        case "consensus":
            return ConsensusDrafter()
        case "recycling":
            return TokenRecyclingDrafter(runner.vocab_size)
        case "stand":
            return StandDrafter()
        case "clasp":
            skipped = min(max(round(parts.clasp_skipped * runner.shape.layers), 1), runner.shape.layers - 1)
            return ClaspDrafter(runner, skipped, rules=parts.rules)
        case "eagle3" if parts.eagle3 is not None:
            embed = runner.view.module.get_input_embeddings()
            return Eagle3Drafter(
                parts.eagle3,
                embed,
                slots=slots,
                capacity=capacity,
                dtype=dtype,
                rules=parts.rules,
                window=parts.eagle3_window,
            )
        case "draft_model" if parts.draft_model is not None:
            return DraftModelDrafter(
                parts.draft_model,
                runner.vocab_size,
                slots=slots,
                capacity=capacity,
                dtype=dtype,
                rules=parts.rules,
            )
        case "composite":
            suffix, model = engine.drafters.get("suffix"), engine.drafters.get("eagle3")
            if isinstance(suffix, SuffixDrafter) and model is not None:
                return CompositeDrafter(suffix, model, parts.composite_match)
    raise ValueError(f"the drafter {name!r} is unknown, or what it is made of is missing")
