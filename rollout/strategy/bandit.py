"""A bandit over strategies, for each bucket of batch size and context, that learns from measured times."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from paceline.rollout.strategy.buckets import Bucket, bucket_of
from paceline.rollout.strategy.cost_model import CostModel
from paceline.rollout.strategy.strategy import PLAIN, StepFeedback, Strategy

_PRIOR_STEPS = 64  # weight of the cost model's estimate, in measured steps
_EXPLORATION_RATE = 0.1  # share of steps that look for an arm to explore
_MAX_EXPLORATION_LOSS = 1 / 3  # most that one exploration may be expected to lose, as a share of its time
_BURST_STEPS = 3  # length of an exploration; its first step also pays for tokens the drafter has not read yet
_MAX_TRIALS = 3  # bursts after which an arm is no longer waited for; none of its steps could be timed


@dataclass(slots=True)
class _Arm:
    """The recent steps of one strategy in one bucket.

    Attributes:
        steps: (the bucket's step count, tokens per sequence, seconds) of each step, oldest first.
        tokens: Sum of the tokens per sequence over ``steps``.
        seconds: Sum of the seconds over ``steps``.
    """

    steps: deque[tuple[int, float, float]]
    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, at: int, tokens: float, seconds: float) -> None:
        """Appends a step."""
        self.steps.append((at, tokens, seconds))
        self.tokens += tokens
        self.seconds += seconds

    def drop_before(self, at: int) -> None:
        """Drops steps before ``at``, so that an arm does not win on what it achieved long ago."""
        while self.steps and self.steps[0][0] < at:
            _, tokens, seconds = self.steps.popleft()
            self.tokens -= tokens
            self.seconds -= seconds


@dataclass(slots=True)
class _Bucket:
    """The allowance of explorations in one bucket.

    Attributes:
        steps: Number of steps in the bucket.
        seconds: Time spent in the bucket.
        lost: Seconds that explorations were expected to lose against the best arm.
        exploring: Arm that is being explored, if any.
        left: Steps left of that exploration.
        trials: Number of bursts that were to give an arm its first times.
    """

    steps: int = 0
    seconds: float = 0.0
    lost: float = 0.0
    exploring: Strategy | None = None
    left: int = 0
    trials: dict[Strategy, int] = field(default_factory=dict)


class BanditSelector:
    """Selects strategies by BEG-MAB, a bucketed ε-greedy bandit over a sliding window.

    TLT (Hu et al., "Taming the Long-Tail", arXiv 2511.16665): strategies are arms, each bucket of batch sizes
    has its own statistics, and a window of recent steps follows a changing policy and drafter. Here a bucket
    is (batch, context), plain decoding is one of the arms, and the reward is tokens committed per sequence
    and second of measured time, drafting included, as the ratio of the window's sums.

    Two rules keep exploration cheap. First, an arm starts from the estimate of `CostModel`, which counts as
    64 steps, and only arms that could be the best, given what is known of their drafter, are explored; the
    longer a drafter has not run, the less is known of it. Second, explorations draw on an allowance, the
    share ε of the time spent in the bucket, which is charged with the loss expected of each.

    With ``thompson`` the arm is drawn from the posterior of its rate instead (Thompson sampling, as EESD does
    for the draft length, arXiv 2406.03853): a normal distribution with the estimate's mean and the standard
    deviation that this many steps leave.

    Losslessness: the choice is a function of counts and times of *earlier* steps and of the selector's own
    random numbers, never of this step's draft or random numbers. Given the past, each step's tokens have the
    target's distribution whatever was chosen. The acceptance counts of the past depend on its tokens, but the
    distribution holds conditionally on the past.

    Args:
        arms_of: Returns the strategies to choose from with a drafter, given its name; plain decoding is
            always an arm.
        drafters: Names of the drafters that exist already; `drafter_changed` adds others.
        cost: Cost model; it learns from the same steps.
        epsilon: Share of the time that explorations may lose, by the estimates, against the best arm.
        window: Number of steps of a bucket that count.
        thompson: Whether to use Thompson sampling instead of ε-greedy.
        seed: Seed of the explorations.
        burst_steps: Number of steps that an exploration lasts.
        calibrated: Whether the cost model's times come from a calibration. Without one, an arm that was never
            timed in a bucket is expected to be as fast as plain decoding there. So each bucket begins with a
            burst of plain decoding, and the first choice of an arm is a whole burst, too: the arms that look
            best are timed one after the other until a timed one is the best.
    """

    def __init__(
        self,
        arms_of: Callable[[str], Sequence[Strategy]],
        drafters: Sequence[str],
        cost: CostModel,
        *,
        epsilon: float = 0.02,
        window: int = 128,
        thompson: bool = False,
        seed: int = 0,
        burst_steps: int = _BURST_STEPS,
        calibrated: bool = True,
    ) -> None:
        self._arms_of = arms_of
        self.arms: dict[str | None, Sequence[Strategy]] = {None: (PLAIN,)} | {
            name: arms_of(name) for name in drafters
        }
        self.cost, self.epsilon, self.window, self.thompson = cost, epsilon, window, thompson
        self._burst_steps, self._calibrated = burst_steps, calibrated
        self._random = random.Random(seed)
        self._measured: dict[tuple[Bucket, Strategy], _Arm] = {}
        self._buckets: dict[Bucket, _Bucket] = {}

    def choose(self, active: int, context: int) -> Strategy:
        """Returns an exploration or the arm of largest estimated rate; see `Selector.choose`."""
        bucket = bucket_of(active, context)
        known = self._buckets.setdefault(bucket, _Bucket())
        if known.left > 0 and known.exploring is not None:
            known.left -= 1
            return known.exploring
        rates = {arm: self.rate(arm, bucket) for arms in self.arms.values() for arm in arms}
        if self.thompson:
            return max(rates, key=lambda arm: self._random.gauss(rates[arm], self._spread(arm, bucket)))
        best = max(rates, key=rates.__getitem__)
        for arm in () if self._calibrated else (PLAIN, best):
            if not self.cost.timed(arm, bucket) and known.trials.get(arm, 0) < _MAX_TRIALS:
                known.trials[arm] = known.trials.get(arm, 0) + 1
                return self._begin(known, arm)
        if self.epsilon > 0 and self._random.random() < _EXPLORATION_RATE:
            explored = self._affordable(bucket, known, rates, best)
            if explored is not None:
                return self._begin(known, explored)
        return best

    def _begin(self, known: _Bucket, arm: Strategy) -> Strategy:
        """Begins a burst of the arm and returns the arm."""
        known.exploring, known.left = arm, self._burst_steps - 1
        return arm

    def _affordable(
        self, bucket: Bucket, known: _Bucket, rates: dict[Strategy, float], best: Strategy
    ) -> Strategy | None:
        """Returns a random arm that may beat the best one and whose trial fits the allowance, or None."""
        most = _MAX_EXPLORATION_LOSS * self._burst_steps * self.cost.seconds(best, bucket)
        allowance = min(self.epsilon * known.seconds - known.lost, most)
        candidates = []
        for arm in rates:
            if arm == best or self._optimistic_rate(arm, bucket, best) <= rates[best]:
                continue
            loss = self._burst_steps * self.cost.seconds(arm, bucket) * (1 - rates[arm] / rates[best])
            if loss <= allowance:
                candidates.append((arm, loss))
        if not candidates:
            return None
        arm, loss = self._random.choice(candidates)
        known.lost += loss
        return arm

    def rate(self, arm: Strategy, bucket: Bucket) -> float:
        """Estimates the arm's tokens per sequence and second from the window and the cost model."""
        tokens, seconds = self.cost.tokens(arm), self.cost.seconds(arm, bucket)
        measured = self._measured.get((bucket, arm))
        if measured is None:
            return tokens / seconds
        measured.drop_before(self._buckets[bucket].steps - self.window if bucket in self._buckets else 0)
        return (_PRIOR_STEPS * tokens + measured.tokens) / (_PRIOR_STEPS * seconds + measured.seconds)

    def _spread(self, arm: Strategy, bucket: Bucket) -> float:
        """Returns the standard deviation of `rate`.

        The number of tokens of a step deviates from its mean by about as much as the mean exceeds one.
        """
        measured = self._measured.get((bucket, arm))
        steps = _PRIOR_STEPS + (len(measured.steps) if measured is not None else 0)
        return (self.cost.tokens(arm) - 1) / (steps * bucket.batch) ** 0.5 / self.cost.seconds(arm, bucket)

    def _optimistic_rate(self, arm: Strategy, bucket: Bucket, best: Strategy) -> float:
        """Returns the tokens per sequence and second that the arm may reach at best.

        The number of tokens of plain decoding, or with the best arm's drafter, is well known, but the time
        may only have been calculated, or measured long ago.
        """
        known = arm.drafter in (None, best.drafter)
        seconds = (self.cost.optimistic_seconds if known else self.cost.seconds)(arm, bucket)
        return self.cost.optimistic_tokens(arm) / seconds

    def strategies(self) -> Sequence[Strategy]:
        """Returns all arms."""
        return [arm for arms in self.arms.values() for arm in arms]

    def best_arms(self) -> dict[Bucket, tuple[Strategy, int]]:
        """Returns the best of the timed arms, and the number of steps, of each bucket with steps."""
        best = {}
        for bucket, known in self._buckets.items():
            timed = [arm for arm in self.strategies() if self.cost.timed(arm, bucket)]
            if timed:
                best[bucket] = max(timed, key=lambda arm: self.rate(arm, bucket)), known.steps
        return best

    def record(self, feedback: StepFeedback) -> None:
        """Learns from a finished step."""
        steady = self.cost.add(feedback)
        if self.cost.surprised_by is not None:
            self._forget(self.cost.surprised_by)
        bucket = bucket_of(feedback.active, feedback.context)
        known = self._buckets.setdefault(bucket, _Bucket())
        known.steps += 1
        known.seconds += feedback.total_seconds
        if not steady:
            return
        arm = self._measured.get((bucket, feedback.strategy))
        if arm is None:
            arm = self._measured[bucket, feedback.strategy] = _Arm(deque())
        arm.add(known.steps, feedback.committed / feedback.active, feedback.total_seconds)

    def drafter_changed(self, name: str) -> None:
        """Adds a drafter's arms, or drops what was measured with its old weights.

        The learned acceptance stays as a weak prior.
        """
        self.arms.setdefault(name, self._arms_of(name))
        self.cost.soften(name)
        self._forget(name)

    def drafter_lost(self, name: str) -> None:
        """Removes the drafter's arms."""
        self.arms.pop(name, None)
        self._forget(name)
        for known in self._buckets.values():
            known.left = 0

    def _forget(self, drafter: str) -> None:
        for key in [key for key in self._measured if key[1].drafter == drafter]:
            del self._measured[key]

    def state(self) -> dict[str, Any]:
        """Returns everything learned, as JSON."""
        windows = [[*bucket, str(arm), list(m.steps)] for (bucket, arm), m in self._measured.items()]
        return {
            "cost": self.cost.state(),
            "windows": windows,
            "spent": [[*bucket, b.steps, b.seconds, b.lost] for bucket, b in self._buckets.items()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from what `state` returned; strategies that are no longer among the arms are ignored.

        Raises:
            ValueError: The argument is not such a state; nothing of it is taken over.
        """
        try:
            measured = {}
            for batch, context, name, steps in state["windows"]:
                arm = measured[Bucket(batch, context), Strategy.parse(name)] = _Arm(deque())
                for at, tokens, seconds in steps:
                    arm.add(int(at), float(tokens), float(seconds))
            buckets = {
                Bucket(b, c): _Bucket(steps, seconds, lost) for b, c, steps, seconds, lost in state["spent"]
            }
            self.cost.load_state(state["cost"])
            self._measured.update(measured)  # last, so that nothing of a broken state is taken over
            self._buckets = buckets
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"not a selector's state ({type(error).__name__}: {error}): delete it to start afresh"
            ) from None
