"""Compares decode steps during a pause of training with the steps around it."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Hashable
from dataclasses import dataclass, field
from statistics import median
from typing import NamedTuple

from paceline.drafter_trainer.slowdown.neighbours import Neighbours


class PauseResult(NamedTuple):
    """The result of one pause.

    Attributes:
        pause: Identifies the pause among all of the RL step, for every rank alike.
        log_ratio: Logarithm of a decode step's time beside training over its time during the pause.
    """

    pause: int
    log_ratio: float


class _Step(NamedTuple):
    at: float
    work: Hashable
    seconds: float


@dataclass(slots=True)
class _Window:
    """A time in which the neighbours' state did not change, and the decode steps within it."""

    neighbours: Neighbours
    began: float
    steps: list[_Step] = field(default_factory=list)


class PauseComparison:
    """Finds by how much training slows the decode steps of a rank, from pauses of the training.

    A pause is compared with the training just before and just after it, in steps of equal work: the mean of
    both sides cancels what drifts, such as the growth of contexts. Only steps count during which no rank of
    the machine began or ended anything, and the same ranks must be busy and training in all three windows.
    So what other batches, other strategies or a rank that finishes cost is not attributed to training.

    It does no I/O: the caller looks at the neighbours from time to time and passes what it saw.

    Args:
        span: Number of seconds on each side of a pause that it is compared with.
    """

    def __init__(self, span: float) -> None:
        self._span = span
        self._unplaced: list[_Step] = []
        self._windows: deque[_Window] = deque(maxlen=3)
        self._seen: Neighbours | None = None

    @property
    def beside_training(self) -> bool:
        """Whether some rank was in training at the last look, so that looks should be frequent."""
        return self._seen is not None and self._seen.training > 0

    def add(self, at: float, work: Hashable, seconds: float) -> None:
        """Adds a decode step that has just ended.

        Args:
            at: Time of its end, in seconds.
            work: Equal for steps with the same amount of work.
            seconds: Its duration.
        """
        self._unplaced.append(_Step(at, work, seconds))

    def look(self, at: float, neighbours: Neighbours) -> PauseResult | None:
        """Places the steps since the last look, and drops them if anything has changed since.

        Args:
            at: Time of the look, in seconds; steps that ended later must not have been added yet.
            neighbours: What the ranks of the machine do at this time.

        Returns:
            The result of a pause once the training after it has lasted for ``span`` seconds; otherwise None.
        """
        steps, self._unplaced = self._unplaced, []
        pure = neighbours.paused in (0, neighbours.training)
        if neighbours != self._seen:
            self._seen = neighbours
            if pure:
                self._windows.append(_Window(neighbours, at))
            return None
        if not pure:
            return None
        window = self._windows[-1]
        window.steps = [step for step in (*window.steps, *steps) if step.at > at - self._span]
        return self._result() if at - window.began >= self._span else None

    def _result(self) -> PauseResult | None:
        """Returns the result of the pause before the current window, once."""
        if len(self._windows) < 3 or not _is_pause_in_training(*self._windows):
            return None
        before, pause, after = self._windows
        self._windows.popleft()
        ratio = _log_ratio(before, pause, after)
        return None if ratio is None else PauseResult(pause.neighbours.changes, ratio)


def _is_pause_in_training(before: _Window, pause: _Window, after: _Window) -> bool:
    paused = [window.neighbours.paused > 0 for window in (before, pause, after)]
    ranks = {(window.neighbours.busy, window.neighbours.training) for window in (before, pause, after)}
    return paused == [False, True, False] and len(ranks) == 1


def _log_ratio(before: _Window, pause: _Window, after: _Window) -> float | None:
    """Returns the mean log ratio over the kinds of work that all windows have; None if there is none.

    A kind counts as often as it occurs in the window that has fewest of it.
    """
    sides = [_seconds_by_work(window) for window in (before, pause, after)]
    total = weights = 0.0
    for work in sides[0].keys() & sides[1].keys() & sides[2].keys():
        a, b, c = (math.log(median(side[work])) for side in sides)
        weight = min(len(side[work]) for side in sides)
        total, weights = total + weight * ((a + c) / 2 - b), weights + weight
    return total / weights if weights else None


def _seconds_by_work(window: _Window) -> dict[Hashable, list[float]]:
    times: dict[Hashable, list[float]] = {}
    for step in window.steps:
        times.setdefault(step.work, []).append(step.seconds)
    return times
