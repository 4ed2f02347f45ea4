"""The parts from which drafters are built: settings and weights, and what the engine provides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from paceline.rollout.drafters.base import Drafter
from paceline.rollout.drafters.eagle3_model import Eagle3Model
from paceline.rollout.drafters.model_drafts import DraftRules
from paceline.rollout.model.runner import ModelRunner


@dataclass(slots=True)
class DrafterParts:
    """The settings and weights of drafters; each drafter reads its own.

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


@dataclass(frozen=True, slots=True)
class DrafterHost:
    """The part of an engine that drafters are built on.

    Attributes:
        runner: Model runner of the target.
        slots: Number of sequences decoded together.
        capacity: Tokens that a slot of the engine holds.
        drafters: Drafters that were added to the engine before, by name.
    """

    runner: ModelRunner
    slots: int
    capacity: int
    drafters: Mapping[str, Drafter]

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype of the target."""
        return self.runner.view.dtype
