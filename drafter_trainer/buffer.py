"""What the engine's forwards saw of recent rollouts."""

from __future__ import annotations

import random
from collections.abc import Iterator

from rollout.api import DistillationTrace, Rollout


class TraceBuffer:
    """The traces of this step and of the one before, which came from the policy itself, verified.

    One step is kept back so that a step of short completions does not leave the learner without long ones.

    Args:
        max_tokens: Traces beyond this many tokens a step are left out, the shortest first.
    """

    def __init__(self, max_tokens: int = 65536) -> None:
        self.max_tokens = max_tokens
        self._current: list[DistillationTrace] = []
        self._previous: list[DistillationTrace] = []

    def begin_step(self) -> None:
        """A new step: what is current becomes previous."""
        self._previous, self._current = self._current, []

    def add(self, rollouts: list[Rollout]) -> None:
        """Keeps the traces of finished rollouts. Those with fewer than two completion tokens teach nothing and are skipped."""
        fresh = [r.trace for r in rollouts if r.trace is not None and len(r.token_ids) >= 2]
        fresh.sort(key=lambda trace: -len(trace.token_ids))
        room = self.max_tokens
        for trace in fresh:
            room -= len(trace.token_ids)
            if room >= 0:
                self._current.append(trace)

    def batches(self, budget: int, seed: int) -> Iterator[list[DistillationTrace]]:
        """One pass over the current traces in micro-batches of similar length, at most ``budget`` tokens each with padding.

        Each micro-batch of this step is followed, one time in four, by one of the previous step.
        """
        order = random.Random(seed)
        current = _similar_lengths(self._current, budget)
        previous = _similar_lengths(self._previous, budget)
        order.shuffle(current)
        order.shuffle(previous)
        for number, batch in enumerate(current):
            yield batch
            if number % 4 == 3 and previous:
                yield previous.pop()

    @property
    def tokens(self) -> int:
        """Tokens of the current step's traces."""
        return sum(len(t.token_ids) for t in self._current)


def _similar_lengths(traces: list[DistillationTrace], budget: int) -> list[list[DistillationTrace]]:
    batches: list[list[DistillationTrace]] = []
    longest = 0
    for trace in sorted(traces, key=lambda t: -len(t.token_ids)):
        if not batches or (len(batches[-1]) + 1) * longest > budget:
            batches.append([])
            longest = len(trace.token_ids)
        batches[-1].append(trace)
    return batches
