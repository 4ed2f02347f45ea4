"""Which requests hold which slots."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from rollout.sequence import SequenceState


class Scheduler:
    """Continuous batching: sequences occupy slots ``0 .. active - 1`` without gaps, so that a step costs what is active.

    Args:
        slots: Sequences decoded together.
    """

    def __init__(self, slots: int) -> None:
        self.slots = slots
        self.waiting: deque[SequenceState] = deque()
        self.active: list[SequenceState] = []

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.active)

    def admit(self) -> Iterator[tuple[int, SequenceState]]:
        """Moves waiting sequences into free slots, in order of arrival; yields (slot, sequence)."""
        while self.waiting and len(self.active) < self.slots:
            sequence = self.waiting.popleft()
            self.active.append(sequence)
            yield len(self.active) - 1, sequence

    def retire(self) -> Iterator[tuple[int, int]]:
        """Drops finished sequences; the last unfinished one fills each hole.

        Yields (slot that ends, slot whose sequence moves into it); the two are equal when nothing moves.
        """
        slot = 0
        while slot < len(self.active):
            last = len(self.active) - 1
            if self.active[last].finish is not None:
                self.active.pop()
                yield last, last
            elif self.active[slot].finish is not None:
                self.active[slot] = self.active.pop()
                yield slot, last
            else:
                slot += 1

    def clear(self) -> None:
        """Forgets everything: the caller stopped listening."""
        self.waiting.clear()
        self.active.clear()
