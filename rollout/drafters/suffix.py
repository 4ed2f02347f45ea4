"""Model-free drafting from what other samples of the same prompt have already said."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable

import torch

from rollout.drafters.base import DraftContext
from rollout.sequence import SequenceState
from rollout.trees.chain import DraftTree, chain_parents

_CONTEXT_LENGTHS = (8, 4, 2)


class _GroupIndex:
    """Next-token counts after every context of 8, 4 and 2 tokens seen in one prompt's samples."""

    def __init__(self) -> None:
        self.counts: dict[tuple[int, ...], dict[int, int]] = {}
        self.entries = 0

    def add(self, tokens: list[int], count: int) -> None:
        for end in range(len(tokens) - count, len(tokens)):
            for length in _CONTEXT_LENGTHS:
                if end >= length:
                    self._count(tuple(tokens[end - length : end]), tokens[end])

    def _count(self, context: tuple[int, ...], token: int) -> None:
        following = self.counts.get(context)
        if following is None:
            following = self.counts[context] = {}
        if token not in following:
            self.entries += 1
        following[token] = following.get(token, 0) + 1

    def next_token(self, tokens: list[int]) -> int | None:
        """The most frequent continuation of the longest context that was seen before."""
        for length in _CONTEXT_LENGTHS:
            following = self.counts.get(tuple(tokens[-length:])) if len(tokens) >= length else None
            if following:
                return max(following, key=following.__getitem__)
        return None


class SuffixDrafter:
    """Drafts by longest suffix match in the samples of the same group, live ones and those of earlier epochs alike.

    The samples of a prompt repeat each other (Multi-Sample SD, arXiv 2503.05330; SAM-Decoding, arXiv 2411.10666), so no model is
    needed and it works from the first step. Here a suffix is matched at 8, 4, then 2 tokens and extended greedily by
    the most frequent next token; the prompt's own tokens count as one more sample. Deterministic: ``probs`` is None.

    Args:
        max_entries: (context, token) pairs kept over all groups, about 200 bytes each; the least recently used groups go first.
    """

    name = "suffix"
    needs_taps = False

    def __init__(self, max_entries: int = 1_000_000) -> None:
        self.max_entries = max_entries
        self._groups: OrderedDict[Hashable, _GroupIndex] = OrderedDict()
        self._entries = 0

    def propose(self, context: DraftContext, depth: int) -> DraftTree:
        rows = [self._extend(sequence, depth) for sequence in context.sequences]
        lengths = torch.tensor([len(row) for row in rows])
        tokens = torch.tensor([row + [0] * (depth - len(row)) for row in rows]).view(len(rows), depth)
        return DraftTree(tokens, chain_parents(len(rows), depth), lengths)

    def _extend(self, sequence: SequenceState, depth: int) -> list[int]:
        index = self._groups.get(self._key(sequence))
        if index is None:
            return []
        tail = sequence.tokens[-max(_CONTEXT_LENGTHS) :]
        drafted: list[int] = []
        while len(drafted) < depth:
            token = index.next_token(tail)
            if token is None:
                break
            drafted.append(token)
            tail.append(token)
        return drafted

    def observe(self, sequence: SequenceState, count: int) -> None:
        key = self._key(sequence)
        index = self._groups.get(key)
        if index is None:
            index = self._groups[key] = _GroupIndex()
        elif count == sequence.num_prompt == len(sequence.tokens):
            return  # the prompt is already there, from another sample
        self._groups.move_to_end(key)
        before = index.entries
        index.add(sequence.tokens, count)
        self._entries += index.entries - before
        self._evict(keep=key)

    def _evict(self, keep: Hashable) -> None:
        while self._entries > self.max_entries and next(iter(self._groups)) != keep:
            _, oldest = self._groups.popitem(last=False)
            self._entries -= oldest.entries

    @staticmethod
    def _key(sequence: SequenceState) -> Hashable:
        """Ungrouped requests share nothing: the sequence object itself is their key."""
        group = sequence.request.group
        return sequence if group is None else group

    def move(self, source: int, target: int) -> None:
        """State is by prompt, not by slot: nothing to do."""

    def release(self, slot: int) -> None:
        """State is by prompt, not by slot: nothing to do."""

    def forget(self, sequence: SequenceState) -> None:
        """A finished sample stays useful to its siblings and to later epochs; one without a group has neither."""
        if sequence.request.group is None:
            index = self._groups.pop(sequence, None)
            self._entries -= 0 if index is None else index.entries
