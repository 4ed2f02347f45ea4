"""Model-free drafting from a sequence's own text."""

from __future__ import annotations

from paceline.rollout.drafters.base import DraftContext, StatelessSlots
from paceline.rollout.drafters.best_first import pack
from paceline.rollout.drafters.model_drafts import DraftRules
from paceline.rollout.sequence import SequenceState
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import DraftKind, DraftTree


class NgramDrafter(StatelessSlots):
    """Copies what followed the most recent earlier occurrence of the last tokens.

    Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023), as in vLLM's ``ngram`` method: longer n-grams are
    tried first. The drafter reads the sequence's prompt and completion and nothing else, and drafts only
    chains.

    Args:
        longest: Maximum length in tokens of the n-grams that are looked up.
        shortest: Minimum length of these n-grams.
    """

    name = "ngram"
    chains_only = True

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self.longest, self.shortest = longest, shortest
        self._seen: dict[SequenceState, tuple[dict[tuple[int, ...], int], int]] = {}

    @staticmethod
    def drafts(strategy: Strategy, rules: DraftRules) -> DraftKind:
        """Returns FIXED: drafts are a function of the committed tokens."""
        return DraftKind.FIXED

    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        """Drafts a copied chain for each sequence."""
        rows = [
            [(token, i - 1) for i, token in enumerate(self._copy(s, strategy.depth))]
            for s in context.sequences
        ]
        return pack(rows, 1)

    def _copy(self, sequence: SequenceState, depth: int) -> list[int]:
        after, _ = self._seen.get(sequence, ({}, 0))
        for n in range(self.longest, self.shortest - 1, -1):
            at = after.get(tuple(sequence.tokens[-n:]))
            if at is not None:
                return sequence.tokens[at : at + depth]
        return []

    def observe(self, sequence: SequenceState, count: int) -> None:
        """Indexes the n-grams of the new tokens."""
        after, indexed = self._seen.get(sequence, ({}, 0))
        tokens = sequence.tokens
        # nothing follows the last n-gram yet
        for end in range(max(indexed, self.shortest), len(tokens)):
            for n in range(self.shortest, min(self.longest, end) + 1):
                after[tuple(tokens[end - n : end])] = end
        self._seen[sequence] = after, len(tokens)

    def forget(self, sequence: SequenceState) -> None:
        """Drops the sequence's index."""
        self._seen.pop(sequence, None)
