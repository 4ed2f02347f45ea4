"""Drafting with a small language model of the target's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from paceline.rollout.drafters.base import DraftContext, VerifiedStep
from paceline.rollout.drafters.lm_expander import LMExpander
from paceline.rollout.drafters.model_drafts import DraftRules
from paceline.rollout.model.runner import Chunk, ModelRunner
from paceline.rollout.sequence import SequenceState
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import MAX_NODES, DraftKind, DraftTree


class DraftModelDrafter:
    """A separate causal LM drafts chains and trees (Leviathan et al., arXiv 2211.17192; Chen et al., arXiv
    2302.01318).

    It keeps a cache of its own, and reads what was committed when a draft is wanted, not before.

    Args:
        model: Any transformers decoder with the target's tokenizer.
        vocab_size: Of the target.
        slots: Sequences decoded together.
        capacity: Tokens a slot of the engine holds.
        dtype: What to compute in.
        rules: How drafts are made; None for chains and dynamic trees of the likeliest tokens.

    Raises:
        ValueError: for a model of another vocabulary.
    """

    name = "draft_model"
    needs_taps = False

    def __init__(
        self,
        model: PreTrainedModel,
        vocab_size: int,
        *,
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        rules: DraftRules | None = None,
    ) -> None:
        own = model.config.get_text_config().vocab_size
        if own != vocab_size:
            raise ValueError(
                f"the draft model has {own} tokens, the policy {vocab_size}: give one with the policy's "
                "tokenizer"
            )
        self.rules = DraftRules() if rules is None else rules
        self.runner = ModelRunner(model, dtype=dtype, slots=slots, capacity=capacity + MAX_NODES)
        self._seen = [0] * slots

    @staticmethod
    def drafts(strategy: Strategy, rules: DraftRules) -> DraftKind:
        return rules.kind(strategy.width)

    @torch.no_grad()
    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        sequences = context.sequences
        held = len(sequences) if any(self._seen) else 0
        self.runner.cache.reserve(
            max(len(s.tokens) for s in sequences) + MAX_NODES, active=held, slots=len(sequences)
        )
        root = self._read(sequences)
        expander = LMExpander(
            self.runner.branch, root, sequences, [len(s.tokens) for s in sequences], self.runner.cache.device
        )
        return self.rules.grow(expander, strategy, sequences)

    def _read(self, sequences: Sequence[SequenceState]) -> torch.Tensor:
        """Reads what was committed since; logits [B, V] after the last token."""
        chunks = [
            Chunk(slot, s.tokens[seen:], seen, len(s.tokens))
            for slot, (s, seen) in enumerate(zip(sequences, self._seen, strict=False))
        ]
        self._seen[: len(sequences)] = [len(s.tokens) for s in sequences]
        return self.runner.prefill(chunks)

    def verified(self, step: VerifiedStep) -> None:
        if step.strategy.drafter == self.name:
            self.rules.learn(step)

    def observe(self, sequence: SequenceState, count: int) -> None:
        """Tokens are read when the next draft is wanted: nothing to do."""

    def move(self, source: int, target: int) -> None:
        self.runner.cache.copy_slot(source, [target], min(self._seen[source], self.runner.cache.span))
        self._seen[target] = self._seen[source]

    def release(self, slot: int) -> None:
        self._seen[slot] = 0

    def forget(self, sequence: SequenceState) -> None:
        """State is by slot, not by sequence: nothing to do."""
