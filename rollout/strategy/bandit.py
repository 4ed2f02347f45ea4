"""A bandit over strategies, for each bucket of batch size and context, that learns from measured times."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.rollout.strategy.acceptance import expected_tokens
from paceline.rollout.strategy.buckets import Bucket, bucket_of
from paceline.rollout.strategy.cost_model import CostModel
from paceline.rollout.strategy.exploration import Allowance, ExpectedLoss, Trials
from paceline.rollout.strategy.strategy import PLAIN, StepFeedback, Strategy

_PRIOR_STEPS = 64  # weight of the cost model's estimate, in measured steps
_EXPLORATION_RATE = 0.1  # share of steps that look for an arm to explore
_BURST_STEPS = 3  # length of an exploration
_CERTAIN = 2.0  # standard errors of either rate after which a trial needs no further step
_TIME_SPREAD = 0.1  # standard deviation of a step's time, as a share of it
_GOOD_ACCEPTANCE = 0.8  # of each level of drafts that training may lead to
_KEPT_SHARE, _LONGEST_KEPT = 1 / 8, 8  # a choice is kept for this share of a bucket's steps, and so many
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


class BanditSelector:
    """Selects strategies by BEG-MAB, a bucketed ε-greedy bandit over a sliding window.

    TLT (Hu et al., "Taming the Long-Tail", arXiv 2511.16665): strategies are arms, each bucket of batch sizes
    has its own statistics, and a window of recent steps follows a changing policy and drafter. Here a bucket
    is (batch, context), plain decoding is one of the arms, and the reward is tokens committed per sequence
    and second of measured time, drafting included, as the ratio of the window's sums.

    Four rules keep exploration cheap. First, an arm starts from the estimate of `CostModel`, which counts as
    64 steps and knows what other buckets have taught; of arms that could be the best, given what is known of
    their drafter, one is tried at random. Second, trials draw on an allowance (`Allowance`): the share ε of
    the time of all steps, which is charged with the loss expected of each. Third, an arm that did not become
    the best is left alone, each time for twice as long, until the best arm's time or the drafter's acceptance
    changes. When that time is over, the best arm of each drafter, and plain decoding, are tried again even if
    nothing speaks for them, since the load of the machine may have changed. Fourth, a trial ends as soon as
    its times lie two standard errors apart from those of the best arm.

    Comparing all arms takes a fifth of a millisecond, a large part of a small model's step on a GPU. So the
    best arm is kept for an eighth of the steps that its bucket has seen, at most for eight; explorations, new
    weights and a changed acceptance end that.

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
        calibrated: Whether the cost model's times come from a calibration. Without one, the first bucket, and
            one whose times other buckets do not explain, begins with a burst of plain decoding. Then drafts
            are timed from the shallowest to deeper ones, as long as the next one could be the best.
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
        self._buckets: dict[Bucket, Trials] = {}
        self._allowance = Allowance(epsilon)

    def choose(self, active: int, context: int, explore: bool = True) -> Strategy:
        """Returns an arm on trial or the arm of largest estimated rate; see `Selector.choose`.

        Args:
            active: Number of sequences.
            context: Tokens of the longest one.
            explore: Whether a trial may begin.
        """
        bucket = bucket_of(active, context)
        trials = self._buckets.setdefault(bucket, Trials())
        if trials.left > 0 and trials.arm is not None:
            trials.left -= 1
            return trials.arm
        explores = explore and self.epsilon > 0 and self._random.random() < _EXPLORATION_RATE
        if trials.chosen is not None and trials.steps < trials.chosen_until and not explores:
            return trials.chosen
        rates = {arm: self.rate(arm, bucket) for arm in self._within_reach(bucket)}
        if self.thompson:
            return max(rates, key=lambda arm: self._random.gauss(rates[arm], self._spread(arm, bucket)))
        best = max(rates, key=rates.__getitem__)
        trial = self._first_trial(bucket, trials, best) if explore and not self._calibrated else None
        if trial is None and explores:
            trial = self._trial(bucket, trials, rates, best)
        if trial is None:
            trials.keep(best, min(int(_KEPT_SHARE * trials.steps), _LONGEST_KEPT))
        return trial or best

    def _within_reach(self, bucket: Bucket) -> list[Strategy]:
        """Returns the arms that may be chosen in a bucket.

        Without a calibration nothing is known of a deeper draft before the next shallower one was timed.
        """
        if self._calibrated:
            return [arm for arms in self.arms.values() for arm in arms]
        reached = []
        for arms in self.arms.values():
            for arm in sorted(arms, key=lambda arm: arm.nodes):
                reached.append(arm)
                if not self.cost.informed(arm, bucket):
                    break
        return reached

    def _first_trial(self, bucket: Bucket, trials: Trials, best: Strategy) -> Strategy | None:
        """Begins a trial of an arm that nothing is known of, without a calibration, and returns the arm."""
        for arm in (PLAIN, best):
            if not self.cost.informed(arm, bucket) and trials.first.get(arm, 0) < _MAX_TRIALS:
                trials.first[arm] = trials.first.get(arm, 0) + 1
                return trials.begin(arm, self._burst_steps)
        return None

    def _trial(
        self, bucket: Bucket, trials: Trials, rates: dict[Strategy, float], best: Strategy
    ) -> Strategy | None:
        """Begins a trial if there is reason for one, and returns its arm."""
        factor = self._allowance.changed(trials, best, self.cost.seconds(best, bucket))
        if factor != 1.0:
            self.cost.rescale(bucket, factor)
            rates = {arm: self.rate(arm, bucket) for arm in rates}
        seconds = self._burst_steps * self.cost.seconds(best, bucket)
        hopeful = {
            arm for arm in rates if arm != best and self._optimistic_rate(arm, bucket, best) > rates[best]
        }
        losses = {
            arm: ExpectedLoss(
                self._burst_steps * self.cost.seconds(arm, bucket) * (1 - rates[arm] / rates[best]),
                self.cost.catching_up(arm, bucket),
            )
            for arm in hopeful | self._leaders(rates, best)
        }
        candidates = self._allowance.candidates(trials, best, seconds, losses, hopeful)
        if not candidates:
            return None
        arm = self._random.choice(sorted(candidates, key=str))
        trials.begin(arm, self._burst_steps)
        self._allowance.charge(trials, arm, losses[arm], self._burst_steps, rates[best])
        return arm

    def _leaders(self, rates: dict[Strategy, float], best: Strategy) -> set[Strategy]:
        """Returns the best arm of each drafter, and plain decoding, but for the best arm's drafter."""
        leaders: dict[str | None, Strategy] = {}
        for arm in sorted(rates, key=rates.__getitem__):
            leaders[arm.drafter] = arm
        return {arm for drafter, arm in leaders.items() if drafter != best.drafter}

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
        known = arm.drafter in (None, best.drafter) or not self._calibrated
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

    def most_saved(self, drafter: str) -> float:
        """Returns the share of the time so far that a drafter would save if its drafts were good.

        Good is that four in five tokens are accepted at each level, so that a chain of four brings 3.4
        tokens: more than a new drafter reaches in its first minutes. Where even such drafts are slower than
        plain decoding, because the batch is large, training the drafter does not pay.

        Returns:
            The share, by the estimated times; 1 before anything ran, and for a drafter without arms.
        """
        arms = self.arms.get(drafter, ())
        total = sum(trials.seconds for trials in self._buckets.values())
        if not arms or not total:
            return 1.0
        saved = 0.0
        for bucket, trials in self._buckets.items():
            rate = max(
                expected_tokens([_GOOD_ACCEPTANCE] * arm.depth) / self.cost.seconds(arm, bucket)
                for arm in arms
            )
            plain = 1 / self.cost.seconds(PLAIN, bucket)
            saved += trials.seconds * max(1 - plain / rate, 0.0)
        return saved / total

    def record(self, feedback: StepFeedback) -> None:
        """Learns from a finished step."""
        steady = self.cost.add(feedback)
        if self.cost.surprised_by is not None:
            self._forget(self.cost.surprised_by)
        bucket = bucket_of(feedback.active, feedback.context)
        known = self._buckets.setdefault(bucket, Trials())
        known.steps += 1
        known.seconds += feedback.total_seconds
        self._allowance.seconds += feedback.total_seconds
        tokens = feedback.committed / feedback.active
        if feedback.strategy == known.arm:
            self._allowance.settle(known, tokens, feedback.total_seconds)
        if not steady:
            return
        arm = self._measured.get((bucket, feedback.strategy))
        if arm is None:
            arm = self._measured[bucket, feedback.strategy] = _Arm(deque())
        arm.add(known.steps, tokens, feedback.total_seconds)
        if known.left > 0 and feedback.strategy == known.arm and self._separated(known.arm, bucket):
            self._allowance.stop(known)

    def _separated(self, arm: Strategy, bucket: Bucket) -> bool:
        """Whether what was measured in the bucket shows that another arm is better."""
        others = [a for a in self.strategies() if a != arm and self.cost.timed(a, bucket)]
        if not others:
            return False
        best = max(others, key=lambda a: self.rate(a, bucket))
        highest = self.rate(arm, bucket) * (1 + _CERTAIN * self._relative_error(arm, bucket))
        return highest < self.rate(best, bucket) * (1 - _CERTAIN * self._relative_error(best, bucket))

    def _relative_error(self, arm: Strategy, bucket: Bucket) -> float:
        """Returns the standard error of an arm's rate, as a share of the rate."""
        times = _TIME_SPREAD / max(self.cost.times(arm, bucket), 1) ** 0.5
        if arm.drafter is None:
            return times
        tokens = self.cost.tokens(arm)
        drafts = self.cost.accepted(arm).weight(0)
        return (times**2 + ((tokens - 1) / tokens) ** 2 / drafts) ** 0.5

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
            self._allowance.stop(known)

    def _forget(self, drafter: str) -> None:
        for trials in self._buckets.values():
            trials.forget(drafter)
        for key in [key for key in self._measured if key[1].drafter == drafter]:
            del self._measured[key]

    def state(self) -> dict[str, Any]:
        """Returns everything learned, as JSON."""
        windows = [[*bucket, str(arm), list(m.steps)] for (bucket, arm), m in self._measured.items()]
        return {
            "cost": self.cost.state(),
            "windows": windows,
            "spent": [[*bucket, b.steps, b.seconds] for bucket, b in self._buckets.items()],
            "lost": self._allowance.lost,
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
            buckets = {Bucket(b, c): Trials(steps, seconds) for b, c, steps, seconds, *_ in state["spent"]}
            lost = float(state.get("lost", 0.0))  # states of version 0.1 had it for each bucket
            self.cost.load_state(state["cost"])
            self._measured.update(measured)  # last, so that nothing of a broken state is taken over
            self._buckets = buckets
            self._allowance.seconds = sum(trials.seconds for trials in buckets.values())
            self._allowance.lost = lost
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"not a selector's state ({type(error).__name__}: {error}): delete it to start afresh"
            ) from None
