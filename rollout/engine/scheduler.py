"""Which requests hold which slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from paceline.rollout.length_estimate import LengthEstimate, ObservedLengths
from paceline.rollout.sequence import SequenceState

_UNKNOWN_LENGTH = 128


class Scheduler:
    """Continuous batching: sequences occupy slots ``0 .. active - 1`` without gaps, so that a step costs what
    is active.

    Waiting sequences are admitted longest-predicted-first: the makespan of a batch is bounded by its longest
        sequences, and
    those started last would run on alone (Graham, "Bounds on Multiprocessing Timing Anomalies", 1969: the LPT
    rule).

    Args:
        slots: Most sequences decoded together.
        lengths: Predicts completion lengths.
    """

    def __init__(self, slots: int, lengths: LengthEstimate | None = None) -> None:
        self.slots = slots
        self.lengths: LengthEstimate = ObservedLengths() if lengths is None else lengths
        self.waiting: deque[SequenceState] = deque()
        self.active: list[SequenceState] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.active)

    def submit(self, sequences: Iterable[SequenceState]) -> None:
        """Adds sequences to those waiting. Of equal prediction the earlier one comes first; the unknown ones
        come before all.
        """
        self.waiting.extend(sequences)
        for sequence in self.waiting:
            sequence.predicted = self.lengths.predict(sequence.request)
        self.waiting = deque(sorted(self.waiting, key=lambda s: -self._remaining(s)))

    def _remaining(self, sequence: SequenceState) -> float:
        if sequence.predicted is None:
            return float("inf")
        return min(sequence.predicted - (len(sequence.tokens) - sequence.num_prompt), sequence.remaining)

    def _room(self, sequence: SequenceState) -> int:
        """Tokens a sequence is expected to hold when it ends, not less than it holds now."""
        expected = _UNKNOWN_LENGTH if sequence.predicted is None else sequence.predicted
        return min(max(sequence.num_prompt + int(expected), len(sequence.tokens)), sequence.limit)

    def admit(self, fit: Callable[[int], int]) -> Iterator[tuple[int, SequenceState]]:
        """Moves waiting sequences into free slots; yields (slot, sequence).

        Args:
            fit: Longest sequence → how many sequences the KV cache holds then. Sequences count with their
                predicted length, so that few of those admitted must be preempted later.
        """
        longest = max((self._room(s) for s in self.active), default=0)
        while self.waiting and len(self.active) < self.slots:
            longest = max(longest, self._room(self.waiting[0]))
            if self.active and fit(longest) <= len(self.active):
                return
            sequence = self.waiting.popleft()
            self.active.append(sequence)
            yield len(self.active) - 1, sequence

    def retire(self, ended: Callable[[SequenceState], bool]) -> Iterator[tuple[int, int]]:
        """Drops the sequences that ended; the last one that did not fills each hole.

        Yields (slot that ends, slot whose sequence moves into it); the two are equal when nothing moves.
        """
        slot = 0
        while slot < len(self.active):
            last = len(self.active) - 1
            if ended(self.active[last]):
                self.active.pop()
                yield last, last
            elif ended(self.active[slot]):
                self.active[slot] = self.active.pop()
                yield slot, last
            else:
                slot += 1

    def preempt(self, keep: int) -> list[SequenceState]:
        """The active sequences to put back so that ``keep`` remain: those with the fewest tokens, cheapest to
        read again.
        """
        return sorted(self.active, key=lambda s: len(s.tokens))[: len(self.active) - keep]

    def clear(self) -> None:
        """Forgets everything: the caller stopped listening."""
        self.waiting.clear()
        self.active.clear()
