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

    Prompt lookup (Saxena, "Prompt Lookup Decoding", 2023), as vLLM's ``ngram`` method does it: the longest of
    the n-grams first. It knows the sequence's prompt and completion and nothing else. Always a chain.

    Args:
        longest, shortest: Tokens of the n-grams that are looked up.
    """

    name = "ngram"
    chains_only = True

    def __init__(self, longest: int = 4, shortest: int = 2) -> None:
        self.longest, self.shortest = longest, shortest
        self._seen: dict[SequenceState, tuple[dict[tuple[int, ...], int], int]] = {}

    @staticmethod
    def drafts(strategy: Strategy, rules: DraftRules) -> DraftKind:
        return DraftKind.FIXED

    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
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
        after, done = self._seen.get(sequence, ({}, 0))
        tokens = sequence.tokens
        # the n-gram at the very end has nothing after it yet
        for end in range(max(done, self.shortest), len(tokens)):
            for n in range(self.shortest, min(self.longest, end) + 1):
                after[tuple(tokens[end - n : end])] = end
        self._seen[sequence] = after, len(tokens)

    def forget(self, sequence: SequenceState) -> None:
        self._seen.pop(sequence, None)
