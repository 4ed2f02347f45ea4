"""Which strategy pays: a bandit for each bucket of batch and context, over measured time."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from paceline.rollout.strategy.buckets import Bucket, bucket_of
from paceline.rollout.strategy.cost_model import CostModel
from paceline.rollout.strategy.strategy import PLAIN, StepFeedback, Strategy

_PRIOR_STEPS = 64  # steps that the cost model's estimate counts for beside those measured
_TRIES = 0.1  # share of steps that look for something to explore
_MOST_LOSS = 1.0  # best steps that one exploration may be expected to lose
_UNTIMED_SPEEDUP = 0.1  # how much less time a strategy may take than was calculated for it
_BURST = 3  # steps of an exploration: the first also pays for what the drafter has missed


@dataclass(slots=True)
class _Arm:
    """The recent steps of one strategy in one bucket: (the bucket's count of steps, tokens of a sequence,
    seconds).
    """

    steps: deque[tuple[int, float, float]]
    tokens: float = 0.0
    seconds: float = 0.0

    def add(self, at: int, tokens: float, seconds: float) -> None:
        self.steps.append((at, tokens, seconds))
        self.tokens += tokens
        self.seconds += seconds

    def drop_before(self, at: int) -> None:
        """Forgets older steps: an arm that was good long ago must not come back on that alone."""
        while self.steps and self.steps[0][0] < at:
            _, tokens, seconds = self.steps.popleft()
            self.tokens -= tokens
            self.seconds -= seconds


@dataclass(slots=True)
class _Bucket:
    """What exploration in one bucket may cost: seconds spent there, and how many of them explorations lost
    against the best arm.
    """

    steps: int = 0
    seconds: float = 0.0
    lost: float = 0.0
    exploring: Strategy | None = None
    left: int = 0


class BanditSelector:
    """BEG-MAB: bucketed ε-greedy over a sliding window.

    TLT (Hu et al., "Taming the Long-Tail", arXiv 2511.16665): strategies are arms, buckets of the batch size
    keep statistics apart, and a window of recent steps follows a moving policy and drafter. Here a bucket is
    (batch, context), plain decoding is one of the arms, and the reward is what a step gave over what it took:
    tokens committed per sequence and second of measured time, drafting included, as the ratio of the window's
    sums. Two things keep exploration cheap: an arm starts from `CostModel`'s estimate, which counts as 64
        steps; only arms are explored that could win for all that is known of their
    drafter, which is the less the longer it has not run; and explorations live on an allowance, the share ε
    of the time spent in the bucket, from which each is expected to lose.

    With ``thompson`` the arm is drawn from the posterior of its rate instead (Thompson sampling, as EESD does
    for the draft length, arXiv 2406.03853): a normal with the estimate's mean and the spread that so many
    steps leave.

    Losslessness: the choice is a function of counts and times of *earlier* steps and of numbers of its own,
        never of this step's
    draft or random numbers. Given the past, each step's tokens have the target's distribution whatever was
    chosen; that the past's acceptance counts depend on its tokens changes nothing, since the law holds given
    the past.

    Args:
        arms_of: Strategies to choose from with a drafter, by its name; plain decoding is added.
        drafters: Names of those there are; others are added by `drafter_changed`.
        cost: Estimates, which learn too.
        epsilon: Share of the time that explorations may lose against the best arm's estimate.
        window: Steps of a bucket that count.
        thompson: Thompson sampling instead of ε-greedy.
        seed: Of the explorations.
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
    ) -> None:
        self._arms_of = arms_of
        self.arms: dict[str | None, Sequence[Strategy]] = {None: (PLAIN,)} | {
            name: arms_of(name) for name in drafters
        }
        self.cost, self.epsilon, self.window, self.thompson = cost, epsilon, window, thompson
        self._random = random.Random(seed)
        self._measured: dict[tuple[Bucket, Strategy], _Arm] = {}
        self._buckets: dict[Bucket, _Bucket] = {}

    def choose(self, active: int, context: int) -> Strategy:
        bucket = bucket_of(active, context)
        known = self._buckets.setdefault(bucket, _Bucket())
        if known.left > 0 and known.exploring is not None:
            known.left -= 1
            return known.exploring
        rates = {arm: self.rate(arm, bucket) for arms in self.arms.values() for arm in arms}
        if self.thompson:
            return max(rates, key=lambda arm: self._random.gauss(rates[arm], self._spread(arm, bucket)))
        best = max(rates, key=rates.__getitem__)
        if self.epsilon > 0 and self._random.random() < _TRIES:
            explored = self._affordable(bucket, known, rates, best)
            if explored is not None:
                known.exploring, known.left = explored, _BURST - 1
                return explored
        return best

    def _affordable(
        self, bucket: Bucket, known: _Bucket, rates: dict[Strategy, float], best: Strategy
    ) -> Strategy | None:
        """An arm that could beat the best one, and whose trial costs no more than what is left of the
        allowance.
        """
        allowance = min(
            self.epsilon * known.seconds - known.lost, _MOST_LOSS * self.cost.seconds(best, bucket)
        )
        hopeful = []
        for arm in rates:
            if arm == best or self._optimistic_rate(arm, bucket, best) <= rates[best]:
                continue
            loss = _BURST * self.cost.seconds(arm, bucket) * (1 - rates[arm] / rates[best])
            if loss <= allowance:
                hopeful.append((arm, loss))
        if not hopeful:
            return None
        arm, loss = self._random.choice(hopeful)
        known.lost += loss
        return arm

    def rate(self, arm: Strategy, bucket: Bucket) -> float:
        """Estimated tokens per sequence and second."""
        tokens, seconds = self.cost.tokens(arm), self.cost.seconds(arm, bucket)
        measured = self._measured.get((bucket, arm))
        if measured is None:
            return tokens / seconds
        measured.drop_before(self._buckets[bucket].steps - self.window if bucket in self._buckets else 0)
        return (_PRIOR_STEPS * tokens + measured.tokens) / (_PRIOR_STEPS * seconds + measured.seconds)

    def _spread(self, arm: Strategy, bucket: Bucket) -> float:
        """Standard deviation of the estimate: a step's tokens spread about as far as their mean exceeds
        one.
        """
        measured = self._measured.get((bucket, arm))
        steps = _PRIOR_STEPS + (len(measured.steps) if measured is not None else 0)
        return (self.cost.tokens(arm) - 1) / (steps * bucket.batch) ** 0.5 / self.cost.seconds(arm, bucket)

    def _optimistic_rate(self, arm: Strategy, bucket: Bucket, best: Strategy) -> float:
        """Tokens per sequence and second that the arm may turn out to give.

        Of the best arm's drafter the tokens are known well: there it is the time that was only calculated
        which may be wrong.
        """
        seconds = self.cost.seconds(arm, bucket)
        if arm.drafter == best.drafter and not self.cost.has_timed(arm, bucket):
            seconds *= 1 - _UNTIMED_SPEEDUP
        return self.cost.optimistic_tokens(arm) / seconds

    def strategies(self) -> Sequence[Strategy]:
        return [arm for arms in self.arms.values() for arm in arms]

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
        """A new drafter, or new weights of one: what was measured with the old ones no longer counts, what
        was learned stays as a weak prior.
        """
        self.arms.setdefault(name, self._arms_of(name))
        self.cost.soften(name)
        self._forget(name)

    def drafter_lost(self, name: str) -> None:
        """None of its strategies is an arm any more."""
        self.arms.pop(name, None)
        self._forget(name)
        for known in self._buckets.values():
            known.left = 0

    def _forget(self, drafter: str) -> None:
        for key in [key for key in self._measured if key[1].drafter == drafter]:
            del self._measured[key]

    def state(self) -> dict[str, Any]:
        """All that was learned, as JSON."""
        windows = [[*bucket, str(arm), list(m.steps)] for (bucket, arm), m in self._measured.items()]
        return {
            "cost": self.cost.state(),
            "windows": windows,
            "spent": [[*bucket, b.steps, b.seconds, b.lost] for bucket, b in self._buckets.items()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave; strategies that are no longer among the arms are ignored.

        Raises:
            ValueError: for something else than such a state.
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
            self._measured.update(measured)  # only now: of a state that is broken nothing is taken over
            self._buckets = buckets
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"not a selector's state ({type(error).__name__}: {error}): delete it to learn anew"
            ) from None


# A forward reads one token more than there are nodes: 8, 16 or 32 rows fill the tiles of matrix units, one
#     more starts another.
_CHAINS = (1, 2, 3, 4, 7)
_TREES = ((3, 3, 6), (4, 4, 7), (5, 4, 11), (6, 4, 15), (8, 4, 23), (10, 4, 31))


def default_arms(name: str, max_nodes: int, chains_only: bool = False) -> list[Strategy]:
    """Chains and trees of a drafter, of at most ``max_nodes`` draft tokens."""
    chains = [Strategy(name, d) for d in _CHAINS if d <= max_nodes]
    return (
        chains if chains_only else chains + [Strategy(name, d, w, n) for d, w, n in _TREES if n <= max_nodes]
    )
