"""When an arm that is not the best may be tried again, and what trials may cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

from paceline.rollout.strategy.strategy import Strategy

_MAX_DOUBLINGS = 6  # of the time between two trials of an arm
_CHANGED_TIME = 1.25  # factor by which the best arm's step must become slower or faster to doubt all others
_MAX_LOSS = 1 / 3  # most that one trial may be expected to lose, as a share of the best arm's time


class ExpectedLoss(NamedTuple):
    """Seconds that a trial is expected to lose against the best arm.

    Attributes:
        steps: What its steps lose.
        catching_up: What it loses besides, until its drafter has read all tokens.
    """

    steps: float
    catching_up: float

    @property
    def whole(self) -> float:
        """The sum."""
        return self.steps + self.catching_up


@dataclass(slots=True)
class _Wait:
    """Until when an arm is left alone in a bucket.

    Attributes:
        until: Seconds in the bucket at which the next trial may begin.
        doublings: Number of trials since the arm was the best or something changed.
    """

    until: float = 0.0
    doublings: int = 0


@dataclass(slots=True)
class Trials:
    """The trials in one bucket.

    Attributes:
        steps: Number of steps in the bucket.
        seconds: Time spent in the bucket.
        arm: Arm that is on trial, or was last.
        left: Steps left of the trial.
        loss_of_step: Seconds that each of its steps was expected to lose against the best arm.
        unsettled: Steps of the trial that are still charged with their expected loss.
        best_rate: Tokens per sequence and second of the best arm when the trial began.
        first: Number of bursts that were to give an arm its first times.
        waits: Until when each arm is left alone.
        best: The best arm, and the seconds of its step when it became that or last changed.
        chosen: The arm that was chosen last; None if the next step must compare the arms.
        chosen_until: Number of steps in the bucket up to which it is kept.
    """

    steps: int = 0
    seconds: float = 0.0
    arm: Strategy | None = None
    left: int = 0
    loss_of_step: float = 0.0
    unsettled: int = 0
    best_rate: float = 0.0
    first: dict[Strategy, int] = field(default_factory=dict)
    waits: dict[Strategy, _Wait] = field(default_factory=dict)
    best: tuple[Strategy, float] | None = None
    chosen: Strategy | None = None
    chosen_until: int = 0

    def keep(self, arm: Strategy, steps: int) -> None:
        """Keeps a choice for so many steps."""
        self.chosen, self.chosen_until = arm, self.steps + steps

    def begin(self, arm: Strategy, steps: int) -> Strategy:
        """Begins a trial of so many steps, the present one among them, and returns the arm."""
        self.arm, self.left, self.unsettled, self.chosen = arm, steps - 1, 0, None
        return arm

    def forget(self, drafter: str) -> None:
        """Lets the drafter's arms be tried again, and compares all arms before the next step."""
        self.chosen = None
        self.waits = {arm: wait for arm, wait in self.waits.items() if arm.drafter != drafter}


class Allowance:
    """What the trials of all buckets may lose together: a share of the time of all steps.

    After each trial that did not make an arm the best, it is left alone for as long as it takes to allow the
    loss of the trial, and twice as long each time. So the share of the time that trials take shrinks, while
    nothing changes, and a clearly slower arm is left alone for longer than one that is nearly as fast.

    When a trial begins, its expected loss is charged. After each of its steps, what that step was expected to
    lose is replaced by what it has lost, so that an arm whose time was underestimated is not tried for free.

    Args:
        share: Share of the time that trials may lose against the best arms.

    Attributes:
        seconds: Time of all steps.
        lost: Seconds that all trials have lost, or are expected to lose.
    """

    def __init__(self, share: float) -> None:
        self.share = share
        self.seconds = self.lost = 0.0

    def changed(self, trials: Trials, best: Strategy, seconds: float) -> float:
        """Returns the factor by which the best arm's time has changed since it was noted; 1 for little.

        Args:
            trials: Trials of the bucket; if the time has changed, all arms may be tried again.
            best: Best arm of the bucket.
            seconds: Expected seconds of the best arm's step.
        """
        if trials.best is None or trials.best[0] != best:
            trials.best = best, seconds
        factor = seconds / trials.best[1]
        if 1 / _CHANGED_TIME < factor < _CHANGED_TIME:
            return 1.0
        trials.waits.clear()
        trials.best = best, seconds
        return factor

    def candidates(
        self,
        trials: Trials,
        best: Strategy,
        seconds: float,
        losses: dict[Strategy, ExpectedLoss],
        hopeful: set[Strategy],
    ) -> list[Strategy]:
        """Returns the arms that may be tried now.

        Args:
            trials: Trials of the bucket.
            best: Best arm of the bucket.
            seconds: Expected seconds of a trial's steps if they ran the best arm.
            losses: Arms to consider, with what a trial of each is expected to lose.
            hopeful: Those that may be better than the best arm, by what is known; the steps of their trial
                lose at most a third of its time. The others are checked again, in case times have changed.
        """
        trials.waits.pop(best, None)
        allowed = self.share * self.seconds - self.lost
        due = []
        for arm, loss in losses.items():
            if arm not in hopeful and arm not in trials.waits:
                self._wait(trials, arm, loss)
            waits = arm in trials.waits and trials.waits[arm].until > trials.seconds
            bearable = arm not in hopeful or loss.steps <= _MAX_LOSS * seconds
            if bearable and loss.whole <= allowed and not waits:
                due.append(arm)
        return due

    def _wait(self, trials: Trials, arm: Strategy, loss: ExpectedLoss) -> None:
        wait = trials.waits.setdefault(arm, _Wait())
        wait.until = trials.seconds + loss.whole / self.share * 2**wait.doublings
        wait.doublings = min(wait.doublings + 1, _MAX_DOUBLINGS)

    def charge(self, trials: Trials, arm: Strategy, loss: ExpectedLoss, steps: int, best_rate: float) -> None:
        """Charges a trial that begins with what its steps may lose, and sets when the arm's next may begin.

        Args:
            trials: Trials of the bucket, in which the arm's has begun.
            arm: The arm.
            loss: What the trial is expected to lose.
            steps: Steps of the trial.
            best_rate: Tokens per sequence and second of the best arm.
        """
        self.lost += loss.steps
        trials.loss_of_step, trials.unsettled, trials.best_rate = loss.steps / steps, steps, best_rate
        self._wait(trials, arm, loss)

    def settle(self, trials: Trials, tokens: float, seconds: float) -> None:
        """Replaces the expected loss of a step of the trial by the measured one.

        Args:
            trials: Trials of the bucket.
            tokens: Tokens that the step has committed for each sequence.
            seconds: Seconds of the step, including what the drafter took to catch up.
        """
        if trials.unsettled:
            trials.unsettled -= 1
            self.lost += seconds - tokens / trials.best_rate - trials.loss_of_step

    def stop(self, trials: Trials) -> None:
        """Ends a trial early; what it did not lose is given back."""
        self.lost -= trials.unsettled * trials.loss_of_step
        trials.left = trials.unsettled = 0
