"""Model-free drafting from what most other samples of the prompt say next."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterator

from paceline.rollout.drafters.base import DraftContext, StatelessSlots
from paceline.rollout.drafters.best_first import best_first, pack
from paceline.rollout.drafters.model_drafts import DraftRules
from paceline.rollout.sequence import SequenceState
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import DraftKind, DraftTree

_MOST_MATCHES = 32

Place = tuple[SequenceState, int]


class ConsensusDrafter(StatelessSlots):
    """Votes of the other samples that are being, or were, decoded in the same call.

    Multi-sample speculative decoding (Li et al., "Speculative Decoding for Multi-Sample Inference", arXiv
    2503.05330): the last tokens are looked up in the other samples of the group; what follows there is merged
    into a graph whose edges weigh how many samples and how surely they took them; the draft follows the
    heaviest. Here paths merge where they share a prefix, a vote is the probability that the policy gave the
    token, and a tree keeps what the vote does not decide. Deterministic.

    Args:
        longest, shortest: Tokens of the suffixes that are looked up; the longest that matches counts.
    """

    name = "consensus"

    def __init__(self, longest: int = 4, shortest: int = 1) -> None:
        self.longest, self.shortest = longest, shortest
        self._index: dict[Hashable, dict[tuple[int, ...], list[Place]]] = {}
        self._live: dict[Hashable, set[SequenceState]] = defaultdict(set)

    @staticmethod
    def drafts(strategy: Strategy, rules: DraftRules) -> DraftKind:
        return DraftKind.FIXED

    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        return pack([best_first(self._places(s), _vote, strategy) for s in context.sequences], strategy.width)

    def _places(self, sequence: SequenceState) -> list[Place]:
        """Where in other samples the sequence's last tokens occur."""
        index = self._index.get(sequence.request.group, {})
        for n in range(min(self.longest, len(sequence.tokens)), self.shortest - 1, -1):
            places = [
                (s, at)
                for s, at in index.get(tuple(sequence.tokens[-n:]), [])
                if s is not sequence and at < len(s.tokens)
            ]
            if places:
                return places[-_MOST_MATCHES:]
        return []

    def observe(self, sequence: SequenceState, count: int) -> None:
        group = sequence.request.group
        if group is None:
            return
        index = self._index.setdefault(group, {})
        self._live[group].add(sequence)
        tokens = sequence.tokens
        for end in range(len(tokens) - count + 1, len(tokens) + 1):
            if end < sequence.num_prompt:
                continue
            for n in range(self.shortest, min(self.longest, end) + 1):
                index.setdefault(tuple(tokens[end - n : end]), []).append((sequence, end))

    def forget(self, sequence: SequenceState) -> None:
        """A group's index goes with its last live sample: until then finished ones vote."""
        group = sequence.request.group
        live = self._live.get(group)
        if live is None:
            return
        live.discard(sequence)
        if not live:
            del self._live[group], self._index[group]


def _vote(places: list[Place]) -> Iterator[tuple[float, int, list[Place]]]:
    """Next tokens by the votes of those places, heaviest first."""
    votes: dict[int, float] = defaultdict(float)
    after: dict[int, list[Place]] = defaultdict(list)
    for sequence, at in places:
        if at < len(sequence.tokens):
            token = sequence.tokens[at]
            order = at - sequence.num_prompt
            votes[token] += math.exp(sequence.logprobs[order]) if 0 <= order < len(sequence.logprobs) else 1.0
            after[token].append((sequence, at + 1))
    total = sum(votes.values()) + 0.5
    for token, vote in sorted(votes.items(), key=lambda item: -item[1]):
        yield vote / total, token, after[token]
