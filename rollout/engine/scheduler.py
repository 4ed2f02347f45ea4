"""Assignment of requests to slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator

from paceline.rollout.length_estimate import LengthEstimate, ObservedLengths
from paceline.rollout.sequence import SequenceState

_UNKNOWN_LENGTH = 128  # completion tokens to make room for while no length has been observed


class Scheduler:
    """Schedules sequences onto slots with continuous batching.

    Active sequences occupy slots ``0 .. active - 1`` without gaps, so that a step costs only what is active.
    Waiting sequences are admitted longest-predicted-first: the longest sequences bound the makespan of a
    batch, and if they started last they would run on alone (the LPT rule of Graham, "Bounds on
    Multiprocessing Timing Anomalies", 1969).

    Args:
        slots: Maximum number of sequences decoded together.
        lengths: Predictor of completion lengths; None predicts from observed lengths.
    """

    def __init__(self, slots: int, lengths: LengthEstimate | None = None) -> None:
        self.slots = slots
        self.lengths: LengthEstimate = ObservedLengths() if lengths is None else lengths
        self.waiting: deque[SequenceState] = deque()
        self.active: list[SequenceState] = []

    @property
    def has_work(self) -> bool:
        """Whether any sequence is waiting or active."""
        return bool(self.waiting or self.active)

    def submit(self, sequences: Iterable[SequenceState]) -> None:
        """Adds sequences to the waiting queue.

        Sequences without a prediction come first; among equal predictions, the earlier one does.
        """
        self.waiting.extend(sequences)
        for sequence in self.waiting:
            sequence.predicted = self.lengths.predict(sequence.request)
        self.waiting = deque(sorted(self.waiting, key=lambda s: -self._remaining(s)))

    def _remaining(self, sequence: SequenceState) -> float:
        """Returns the number of tokens predicted to remain; infinity if nothing is known."""
        if sequence.predicted is None:
            return float("inf")
        return min(sequence.predicted - (len(sequence.tokens) - sequence.num_prompt), sequence.remaining)

    def _expected_tokens(self, sequence: SequenceState) -> int:
        """Returns the tokens a sequence is expected to hold when it finishes, at least those it holds now."""
        expected = _UNKNOWN_LENGTH if sequence.predicted is None else sequence.predicted
        return min(max(sequence.num_prompt + int(expected), len(sequence.tokens)), sequence.limit)

    def admit(self, fits: Callable[[list[int]], bool]) -> Iterator[tuple[int, SequenceState]]:
        """Moves waiting sequences into free slots; yields (slot, sequence).

        Args:
            fits: Function that returns whether the KV cache holds sequences of these lengths together.
                Sequences count with their predicted length, so that few of those admitted have to be
                preempted later.
        """
        lengths = [self._expected_tokens(s) for s in self.active]
        while self.waiting and len(self.active) < self.slots:
            lengths.append(self._expected_tokens(self.waiting[0]))
            if self.active and not fits(lengths):
                return
            sequence = self.waiting.popleft()
            self.active.append(sequence)
            yield len(self.active) - 1, sequence

    def retire(self, ended: Callable[[SequenceState], bool]) -> Iterator[tuple[int, int]]:
        """Removes finished sequences and fills each hole with the last unfinished one.

        Args:
            ended: Predicate that says whether a sequence is to be removed.

        Yields:
            Pairs (slot that was vacated, slot whose sequence moves into it); the two are equal if nothing
            moves.
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
        """Returns the active sequences to put back so that ``keep`` remain.

        These are the ones with the fewest tokens, which are the cheapest to prefill again.
        """
        return sorted(self.active, key=lambda s: len(s.tokens))[: len(self.active) - keep]

    def clear(self) -> None:
        """Drops all sequences, when the caller has stopped consuming."""
        self.waiting.clear()
        self.active.clear()
