"""Estimates what training on idle ranks costs the ranks that decode, and decides by it."""

from __future__ import annotations

import math
from collections import deque
from statistics import fmean, stdev

WINDOW_SECONDS = 1.0  # of a pause: dozens of decode steps, yet little of the time that there is for training
_LEAST_PAUSES = 8  # with fewer, two standard errors are no safe distance
_REMEMBERED_STEPS = 8  # of the RL; then it is measured anew, because neighbours and machines change
_UNKNOWN_EVERY = 3  # windows from pause to pause: one before it, itself, and one after it
_UNCERTAIN_EVERY = 8
_MOST_OF_SAVING = 0.5  # training may cost at most this share of what good drafts would save
# share of the time; training was measured to cost 4 to 19 %, which half of less hardly pays
_LEAST_SAVING = 0.1
_MOST_IN_VAIN = 4  # pauses without a result, as where the rest of a step is too short for one


class TrainingPrice:
    """Knows by how much training slows decode steps, and whether it may go on.

    Results of pauses of the last `_REMEMBERED_STEPS` RL steps count. Training must stop when the slowdown
    exceeds the limit by more than two standard errors, which takes at least `_LEAST_PAUSES` results. Because
    results are forgotten, training then begins again for as many pauses as there are results missing: the
    price is found again, whether it has risen or fallen.

    The limit is also at most half of what good drafts would save: where batches are so large that no draft
    pays, every slowdown is a loss.

    Training pauses in every third window of time while there are too few results, in every eighth while the
    limit lies within two standard errors, and else not at all. Ranks of one machine share a clock, so they
    pause together without a word.

    Args:
        limit: Largest share by which training may slow decode steps.

    Attributes:
        slowdown: The share by which training slows decode steps; None with fewer than two results.
        std_error: Its standard error; infinite with fewer than two results.
    """

    def __init__(self, limit: float) -> None:
        self._largest_limit = self._limit = limit
        self._worth_it = True
        self._results: deque[tuple[int, float]] = deque()
        self._step = self._in_vain = 0
        self._update()

    def begin(self, step: int, most_saved: float = 1.0) -> None:
        """Begins RL step ``step`` and forgets the results of steps long past.

        Args:
            step: Number of the step.
            most_saved: Share of the decoding time that good drafts would save.
        """
        self._step = step
        self._limit = min(self._largest_limit, _MOST_OF_SAVING * most_saved)
        self._worth_it = most_saved >= _LEAST_SAVING
        while self._results and self._results[0][0] <= step - _REMEMBERED_STEPS:
            self._results.popleft()
        if step % _REMEMBERED_STEPS == 0:
            self._in_vain = 0
        self._update()

    def add(self, log_ratio: float) -> None:
        """Adds the result of a pause, see `PauseResult.log_ratio`."""
        self._results.append((self._step, log_ratio))
        self._in_vain = 0
        self._update()

    def paused(self) -> None:
        """Notes that this rank's training has paused."""
        self._in_vain += 1

    @property
    def too_high(self) -> bool:
        """Whether the slowdown exceeds the limit beyond doubt, or drafts can save too little."""
        return not self._worth_it or (self._known and self._low > self._limit)

    def pause_due(self, now: float, since: float) -> bool:
        """Returns whether training should pause now, so that decoding without it is seen.

        Args:
            now: Time in seconds, on a clock that the ranks of a machine share.
            since: Time at which this rank began to train.
        """
        window = math.floor(now / WINDOW_SECONDS)
        if window * WINDOW_SECONDS - since < WINDOW_SECONDS or self._in_vain >= _MOST_IN_VAIN:
            return False
        if not self._known:
            return window % _UNKNOWN_EVERY == 0
        return self._low <= self._limit <= self._high and window % _UNCERTAIN_EVERY == 0

    def _update(self) -> None:
        """Computes the estimate anew; ranks ask for it far more often than it changes."""
        ratios = [ratio for _, ratio in self._results]
        self._known = len(ratios) >= _LEAST_PAUSES
        self.slowdown = math.expm1(fmean(ratios)) if len(ratios) > 1 else None
        self.std_error = math.inf
        if self.slowdown is not None:
            self.std_error = (1 + self.slowdown) * stdev(ratios) / math.sqrt(len(ratios))
            self._low = self.slowdown - 2 * self.std_error
            self._high = self.slowdown + 2 * self.std_error
