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

_MAX_MATCHES = 32  # the most recent matches, which bounds the cost of a vote
_NO_VOTE = 0.5  # weight of tokens that no sample took, against votes of at most 1 each

Place = tuple[SequenceState, int]


class ConsensusDrafter(StatelessSlots):
    """Drafts the continuation that the other samples of the group vote for.

    Samples that are being decoded, and those that finished while a sample of the group was still running,
    vote. Multi-sample speculative decoding (Li et al., "Speculative Decoding for Multi-Sample Inference",
    arXiv 2503.05330): the last tokens are looked up in the other samples of the group; the continuations
    found there are merged into a graph whose edges weigh how many samples took them and how surely; the draft
    follows the heaviest ones. Here paths merge where they share a prefix, the weight of a vote is the
    probability that the policy gave the token, and a tree keeps alternatives that the vote does not decide.
    The drafts are deterministic.

    Args:
        longest: Maximum length in tokens of the suffixes that are looked up; the longest match counts.
        shortest: Minimum length of these suffixes.
    """

    name = "consensus"

    def __init__(self, longest: int = 4, shortest: int = 1) -> None:
        self.longest, self.shortest = longest, shortest
        self._index: dict[Hashable, dict[tuple[int, ...], list[Place]]] = {}
        self._live: dict[Hashable, set[SequenceState]] = defaultdict(set)

    @staticmethod
    def drafts(strategy: Strategy, rules: DraftRules) -> DraftKind:
        """Returns FIXED: drafts are a function of the committed tokens."""
        return DraftKind.FIXED

    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        """Drafts each sequence by best-first search over the votes."""
        return pack([best_first(self._places(s), _vote, strategy) for s in context.sequences], strategy.width)

    def _places(self, sequence: SequenceState) -> list[Place]:
        """Returns where in other samples the sequence's last tokens occur."""
        index = self._index.get(sequence.request.group, {})
        for n in range(min(self.longest, len(sequence.tokens)), self.shortest - 1, -1):
            places = [
                (s, at)
                for s, at in index.get(tuple(sequence.tokens[-n:]), [])
                if s is not sequence and at < len(s.tokens)
            ]
            if places:
                return places[-_MAX_MATCHES:]
        return []

    def observe(self, sequence: SequenceState, count: int) -> None:
        """Adds the n-grams of the new tokens to the group's index."""
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
        """Drops the group's index with its last live sample; until then finished samples vote."""
        group = sequence.request.group
        live = self._live.get(group)
        if live is None:
            return
        live.discard(sequence)
        if not live:
            del self._live[group], self._index[group]


def _vote(places: list[Place]) -> Iterator[tuple[float, int, list[Place]]]:
    """Yields the next tokens after the given places by vote, heaviest first."""
    votes: dict[int, float] = defaultdict(float)
    after: dict[int, list[Place]] = defaultdict(list)
    for sequence, at in places:
        if at < len(sequence.tokens):
            token = sequence.tokens[at]
            order = at - sequence.num_prompt
            votes[token] += math.exp(sequence.logprobs[order]) if 0 <= order < len(sequence.logprobs) else 1.0
            after[token].append((sequence, at + 1))
    total = sum(votes.values()) + _NO_VOTE
    for token, vote in sorted(votes.items(), key=lambda item: -item[1]):
        yield vote / total, token, after[token]
