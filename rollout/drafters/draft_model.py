"""Drafting with a small language model that shares the target's vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from transformers import PreTrainedModel

from paceline.rollout.drafters.base import DraftContext, VerifiedStep, has_caught_up
from paceline.rollout.drafters.draft_rows import DraftRows
from paceline.rollout.drafters.lm_expander import LMExpander
from paceline.rollout.drafters.model_drafts import DraftRules
from paceline.rollout.drafters.parts import DrafterHost, DrafterParts
from paceline.rollout.model.runner import Chunk, ModelRunner
from paceline.rollout.sequence import SequenceState
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import MAX_NODES, DraftKind, DraftTree


class DraftModelDrafter:
    """Drafts chains and trees with a separate causal LM.

    Leviathan et al., arXiv 2211.17192; Chen et al., arXiv 2302.01318. The drafter has a cache of its own, and
    reads committed tokens only when a draft is asked for.

    Args:
        model: Any transformers decoder with the target's tokenizer.
        vocab_size: Vocabulary size of the target.
        slots: Number of sequences decoded together.
        capacity: Tokens that a slot of the engine holds.
        dtype: Compute dtype.
        rules: How drafts are made; None for chains and dynamic trees of the likeliest tokens.

    Raises:
        ValueError: The model has another vocabulary size.
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
                f"the draft model has a vocabulary of {own} tokens, the policy {vocab_size}: choose a draft "
                "model with the policy's tokenizer"
            )
        self.rules = DraftRules() if rules is None else rules
        self.runner = ModelRunner(model, dtype=dtype, slots=slots, capacity=capacity + MAX_NODES)
        self._seen = [0] * slots
        self.caught_up = False

    @classmethod
    def build(cls, host: DrafterHost, parts: DrafterParts) -> DraftModelDrafter:
        """Builds the drafter for an engine.

        Raises:
            ValueError: The parts have no draft model, or one of another vocabulary size.
        """
        if parts.draft_model is None:
            raise ValueError("the draft_model drafter has no model: set speculation.draft_model")
        return cls(
            parts.draft_model,
            host.runner.vocab_size,
            slots=host.slots,
            capacity=host.capacity,
            dtype=host.dtype,
            rules=parts.rules,
        )

    @staticmethod
    def drafts(strategy: Strategy, rules: DraftRules) -> DraftKind:
        """Returns the kind of drafts of the strategy's width under ``rules``, see `Drafter`."""
        return rules.kind(strategy.width)

    @torch.no_grad()
    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        """Reads the tokens committed since the last draft, then drafts."""
        sequences = context.sequences
        active = len(sequences) if any(self._seen) else 0
        self.runner.cache.reserve([len(s.tokens) + MAX_NODES for s in sequences], active=active)
        unread = sum(len(s.tokens) - seen for s, seen in zip(sequences, self._seen, strict=False))
        self.caught_up = has_caught_up(unread, len(sequences), strategy)
        root = self._read(sequences)
        rows = DraftRows.of(sequences, self.runner.cache.device)
        expander = LMExpander(self.runner.branch, root, sequences, rows, rows.committed)
        return self.rules.grow(expander, strategy, rows)

    def _read(self, sequences: Sequence[SequenceState]) -> torch.Tensor:
        """Reads the tokens committed since the last draft; returns logits [B, V] after the last token."""
        chunks = [
            Chunk(slot, s.tokens[seen:], seen, len(s.tokens))
            for slot, (s, seen) in enumerate(zip(sequences, self._seen, strict=False))
        ]
        self._seen[: len(sequences)] = [len(s.tokens) for s in sequences]
        return self.runner.prefill(chunks)

    def verified(self, step: VerifiedStep) -> None:
        """Passes verifications of this drafter's drafts on to the stop policy."""
        if step.strategy.drafter == self.name:
            self.rules.learn(step)

    def observe(self, sequence: SequenceState, count: int) -> None:
        """Does nothing: tokens are read when the next draft is asked for."""

    def move(self, source: int, target: int) -> None:
        """Copies the cache of slot ``source`` to slot ``target``."""
        self.runner.cache.vacate(target, source, self._seen[source])
        self._seen[target] = self._seen[source]

    def release(self, slot: int) -> None:
        """Marks the slot as empty."""
        self._seen[slot] = 0

    def forget(self, sequence: SequenceState) -> None:
        """Does nothing: state is kept by slot, not by sequence."""
