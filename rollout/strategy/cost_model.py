"""Estimates what a strategy costs and brings before it was tried: the warm start of the bandit."""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable, Sequence
from statistics import median
from typing import Any, TypeVar

from paceline.rollout.strategy.acceptance import Acceptance, expected_tokens
from paceline.rollout.strategy.buckets import Bucket, bucket_of, distance
from paceline.rollout.strategy.strategy import PLAIN, StepFeedback, Strategy
from paceline.rollout.strategy.times import RECENT_TIMES, Times

K = TypeVar("K", bound=Hashable)

_CHAIN_PRIOR = 0.6  # acceptance of the first level of chains before anything was measured
_TREE_GAIN = 0.25  # share of the first tokens that a chain gets wrong and a tree is expected to have
_UNTIMED_MARGIN = 0.1  # share by which a strategy may be faster than its calculated time
_ALIKE = 1.3  # factor between a time and what another bucket suggests that noise explains
_TIME_AGE = 1000  # steps after which a measured time is no better than a calculated one
_CHECKED_TIMES = 3  # new times that are compared with the old one
_OLD_TIME = 250  # steps after which the next measured time replaces those before it
_TYPICAL_CONTEXT = 0.75  # the typical context of a bucket, as a share of its upper end
_DOUBT = 1.5  # standard errors that an optimistic estimate adds


class CostModel:
    """Estimates seconds and tokens of every strategy in every bucket.

    - Forward: the measured time of (bucket, strategy); if there is none, the calibrated time of that many
      tokens at that context, scaled by the ratio of measured to calibrated time in the bucket: that of plain
      decoding, or else the smallest. The machine may have been busy when it was calibrated. What the strategy
      took longer than calculated in the nearest bucket is expected here, too, and a chain is expected to take
      no less than shallower ones of its drafter. If a strategy that is timed again after a pause has become
      faster or slower, old times of its drafter in that bucket are dropped.
    - Drafting: the measured time of (bucket, strategy); if there is none, that of a level of the same
      drafter, and at first a guess.
    - Tokens: acceptance by level of the drafter's chains or trees, over all buckets.

    Args:
        forward_seconds: Calibrated seconds of a forward: (batch, tokens of each sequence, context) → seconds,
            always the same for the same forward.
        draft_seconds: First guess of the seconds of one draft level: (drafter, batch) → seconds.

    Attributes:
        surprised_by: The drafter whose acceptance changed by the evidence of the last step, or None.
    """

    def __init__(
        self, forward_seconds: Callable[[int, int, int], float], draft_seconds: Callable[[str, int], float]
    ) -> None:
        self._forward_guess = functools.cache(forward_seconds)
        self._draft_guess = draft_seconds
        self._forward = Times[tuple[Bucket, Strategy]]()
        self._timed_at: dict[tuple[Bucket, Strategy], int] = {}
        self._scales: dict[Bucket, float] = {}
        self._chains: dict[str, list[int]] = {}  # depths of the chains that were timed
        # strategies that are measured again after a pause: the time of before and the new ones
        self._again: dict[tuple[Bucket, Strategy], tuple[float, list[float]]] = {}
        self._unlike: set[Bucket] = set()
        self._near: dict[tuple[Bucket, Strategy], Bucket | None] = {}
        self._draft = Times[tuple[Bucket, Strategy]]()
        self._level = Times[tuple[int, str]]()
        self._catching_up = Times[tuple[int, str]]()
        self._overhead = Times[int]()
        self.acceptance: dict[tuple[str, bool], Acceptance] = {}
        # expected tokens by drafter; every step asks for those of all strategies
        self._tokens: dict[str, dict[Strategy, float]] = {}
        self._last_drafter: str | None = None
        self._steps = 0
        self._last_seen: dict[tuple[str, bool], int] = {}
        self.surprised_by: str | None = None

    def accepted(self, strategy: Strategy) -> Acceptance:
        """Returns the acceptance estimate of the strategy's kind: its drafter's chains, or its trees."""
        assert strategy.drafter is not None
        kind = strategy.drafter, strategy.width > 1
        if kind not in self.acceptance:
            self.acceptance[kind] = Acceptance(functools.partial(self._first_level, *kind))
        return self.acceptance[kind]

    def _first_level(self, drafter: str, tree: bool) -> float:
        """Returns the acceptance of the first level that the drafter's drafts of the other kind suggest."""
        other = self.acceptance.get((drafter, not tree))
        usual = _CHAIN_PRIOR if tree else _CHAIN_PRIOR + _TREE_GAIN * (1 - _CHAIN_PRIOR)
        rate = usual if other is None else other.first_level(usual)
        return rate + _TREE_GAIN * (1 - rate) if tree else max((rate - _TREE_GAIN) / (1 - _TREE_GAIN), 0.05)

    def tokens(self, strategy: Strategy) -> float:
        """Returns the expected tokens per sequence of a step."""
        if strategy.drafter is None:
            return 1.0
        known = self._tokens.setdefault(strategy.drafter, {})
        if strategy not in known:
            known[strategy] = expected_tokens(self.accepted(strategy).rates(strategy.depth))
        return known[strategy]

    def optimistic_tokens(self, strategy: Strategy) -> float:
        """Returns an optimistic estimate of `tokens`.

        It adds 1.5 standard errors, which grow with the time since the drafter last ran.
        """
        if strategy.drafter is None:
            return 1.0
        idle = self._steps - self._last_seen.get((strategy.drafter, strategy.width > 1), 0)
        return expected_tokens(self.accepted(strategy).rates(strategy.depth, _DOUBT, idle))

    def timed(self, strategy: Strategy, bucket: Bucket) -> bool:
        """Returns whether a step of the strategy was timed in the bucket."""
        return (bucket, strategy) in self._forward

    def seconds(self, strategy: Strategy, bucket: Bucket) -> float:
        """Returns the expected seconds of a step."""
        return (
            self._forward_seconds(strategy, bucket)
            + self._draft_seconds(strategy, bucket)
            + self._overhead.get(bucket.batch, 0.0)
        )

    def times(self, strategy: Strategy, bucket: Bucket) -> int:
        """Returns how many recent steps of the strategy were timed in the bucket."""
        return self._forward.count((bucket, strategy))

    def informed(self, strategy: Strategy, bucket: Bucket) -> bool:
        """Returns whether the strategy was timed in the bucket, or in others that it resembles."""
        return self.timed(strategy, bucket) or self._nearest(strategy, bucket) is not None

    def optimistic_seconds(self, strategy: Strategy, bucket: Bucket) -> float:
        """Returns an optimistic estimate of `seconds`.

        It takes off up to a tenth: the whole tenth from a time that was only calculated, and from one that
        was measured a part that grows over 1,000 steps, because other work on the machine may have ended.
        """
        timed = self._timed_at.get((bucket, strategy), -_TIME_AGE)
        age = min((self._steps - timed) / _TIME_AGE, 1.0)
        return self.seconds(strategy, bucket) * (1 - _UNTIMED_MARGIN * age)

    def _forward_seconds(self, strategy: Strategy, bucket: Bucket) -> float:
        measured = self._forward.get((bucket, strategy))
        if measured is not None:
            return measured
        return max(
            self._expected(strategy, bucket) * self._scale(bucket), self._extrapolated(strategy, bucket)
        )

    def _extrapolated(self, strategy: Strategy, bucket: Bucket) -> float:
        """Returns the time of a chain that the two next shallower ones of its drafter suggest.

        Without the shallower of them it is the time of the other: a deeper chain is never faster. Without
        either, and for trees, it is 0.
        """
        if strategy.drafter is None or strategy.width > 1:
            return 0.0
        known = [depth for depth in self._chains.get(strategy.drafter, ()) if depth < strategy.depth]
        if not known:
            return 0.0
        *_, shallower, deepest = [0, *known]
        seconds = self._forward_seconds(Strategy(strategy.drafter, deepest), bucket)
        if not shallower:
            return seconds
        level = seconds - self._forward_seconds(Strategy(strategy.drafter, shallower), bucket)
        return seconds + max(level, 0.0) / (deepest - shallower) * (strategy.depth - deepest)

    def _expected(self, strategy: Strategy, bucket: Bucket) -> float:
        """Returns the calibrated time, corrected by what the strategy took in the nearest bucket.

        What it took longer there than calibrated is proportional to the time for larger batches, and to the
        number of sequences for smaller ones: both are the least that it may be, so that it will be tried
        where it may be the best.
        """
        guess = self._guess(strategy, bucket)
        near = self._nearest(strategy, bucket)
        if near is None:
            return guess
        there = self._guess(strategy, near) * self._scales[near]
        longer = self._forward[near, strategy] / there - 1
        if near.batch > bucket.batch:
            longer *= min(bucket.batch / near.batch * there / (guess * self._scale(bucket)), 1.0)
        return guess * (1 + longer)

    def _nearest(self, strategy: Strategy, bucket: Bucket) -> Bucket | None:
        """Returns the nearest other bucket in which the strategy was timed.

        Returns None if there is none, and for a bucket that is unlike the others.
        """
        if bucket in self._unlike:
            return None
        key = bucket, strategy
        near = self._near.get(key)
        if key not in self._near or (near is not None and (near, strategy) not in self._forward):
            others = [known for known, timed in self._forward if timed == strategy and known != bucket]
            self._near[key] = min(others, key=lambda other: distance(other, bucket), default=None)
        return self._near[key]

    def _scale(self, bucket: Bucket) -> float:
        """Returns the ratio of measured to calibrated time in the bucket, or else in the nearest one."""
        if bucket in self._scales or not self._scales:
            return self._scales.get(bucket, 1.0)
        return self._scales[min(self._scales, key=lambda other: distance(other, bucket))]

    def _measured_scale(self, bucket: Bucket) -> float:
        """Returns the ratio of measured to calibrated time in a bucket where something was measured.

        Without plain decoding it is the smallest, and at most 1: what is then expected too fast is tried and
        measured, what is expected too slow would never be.
        """
        plain = self._forward.get((bucket, PLAIN))
        if plain is not None:
            return plain / self._guess(PLAIN, bucket)
        timed = [strategy for known, strategy in self._forward if known == bucket]
        return min(1.0, *(self._forward[bucket, s] / self._expected(s, bucket) for s in timed))

    def _guess(self, strategy: Strategy, bucket: Bucket) -> float:
        return self._forward_guess(bucket.batch, strategy.nodes + 1, int(_TYPICAL_CONTEXT * bucket.context))

    def _draft_seconds(self, strategy: Strategy, bucket: Bucket) -> float:
        if strategy.drafter is None:
            return 0.0
        measured = self._draft.get((bucket, strategy))
        if measured is not None:
            return measured
        level = self._level.get(
            (bucket.batch, strategy.drafter), self._draft_guess(strategy.drafter, bucket.batch)
        )
        return level * strategy.depth

    def add(self, feedback: StepFeedback) -> bool:
        """Learns from a step.

        Returns:
            Whether the step's time is representative of the strategy: not if its drafter had to catch up.
        """
        bucket = bucket_of(feedback.active, feedback.context)
        strategy = feedback.strategy
        self._steps += 1
        self.surprised_by = None
        ran = strategy if any(feedback.drafted) else PLAIN  # with an empty draft, the forward is a plain one
        if (bucket, ran) not in self._forward:
            if bucket not in self._scales:
                self._compare(bucket, ran, feedback.forward_seconds)
            self._note(ran)
        self._add_forward((bucket, ran), feedback.forward_seconds)
        self._scales[bucket] = self._measured_scale(bucket)
        rest = feedback.total_seconds - feedback.forward_seconds - feedback.draft_seconds
        self._overhead.add(bucket.batch, rest)
        if strategy.drafter is not None:
            kind = bucket.batch, strategy.drafter
            if feedback.caught_up:
                longer = feedback.draft_seconds - self._draft_seconds(strategy, bucket)
                self._catching_up.add(kind, max(longer, 0.0))
            else:
                self._draft.add((bucket, strategy), feedback.draft_seconds)
                self._level.add(kind, feedback.draft_seconds / strategy.depth)
            self._last_seen[strategy.drafter, strategy.width > 1] = self._steps
            if self.accepted(strategy).add(feedback.accepted, strategy.depth):
                self.surprised_by = strategy.drafter
            self._tokens.pop(strategy.drafter, None)
        self._last_drafter = strategy.drafter
        return not feedback.caught_up

    def catching_up(self, strategy: Strategy, bucket: Bucket) -> float:
        """Returns the seconds that the drafter is expected to need for tokens that it has not read.

        They are those of its latest drafts after other strategies had run; 0 if this drafter ran last.
        """
        if strategy.drafter is None or strategy.drafter == self._last_drafter:
            return 0.0
        return self._catching_up.get((bucket.batch, strategy.drafter), 0.0)

    def _compare(self, bucket: Bucket, strategy: Strategy, seconds: float) -> None:
        """Notes whether the first time in a bucket is what the nearest bucket suggests.

        Where it is not, the ratios of times there may differ, too. A step may take as long as one of the
        nearest bucket, or as much longer as the batch is larger.
        """
        near = self._nearest(strategy, bucket)
        if near is None:
            return
        ratio = seconds / self._forward_seconds(strategy, bucket)
        # a calibration knows what a larger batch costs, and without one, a guess is the same for all
        larger = bucket.batch / near.batch * self._guess(strategy, near) / self._guess(strategy, bucket)
        if not min(larger, 1.0) / _ALIKE < ratio < max(larger, 1.0) * _ALIKE:
            self._unlike.add(bucket)

    def _add_forward(self, key: tuple[Bucket, Strategy], seconds: float) -> None:
        """Adds a time of a strategy in a bucket; after a pause, checks whether it has changed meanwhile."""
        pause = self._steps - self._timed_at.get(key, self._steps)
        self._timed_at[key] = self._steps
        if pause > RECENT_TIMES:
            self._again[key] = self._forward[key], []
        if pause > _OLD_TIME:
            self._forward.drop(key)
        self._forward.add(key, seconds)
        if key not in self._again:
            return
        before, times = self._again[key]
        times.append(seconds)
        if len(times) == _CHECKED_TIMES:
            del self._again[key]
            if not 1 / _ALIKE < median(times) / before < _ALIKE:
                self._drop_old_times(*key, times)

    def _drop_old_times(self, bucket: Bucket, strategy: Strategy, times: Sequence[float]) -> None:
        """Drops what was measured in a bucket with a drafter before its times have changed."""
        self._forward.drop((bucket, strategy))
        for seconds in times:
            self._forward.add((bucket, strategy), seconds)
        if strategy.drafter is None:
            return
        self._unlike.add(bucket)
        for other in [s for b, s in self._forward if b == bucket and s.drafter == strategy.drafter]:
            if self._steps - self._timed_at[bucket, other] > RECENT_TIMES:
                self._forward.drop((bucket, other))
                del self._timed_at[bucket, other]
                self._near.clear()

    def rescale(self, bucket: Bucket, factor: float) -> None:
        """Multiplies the times of strategies that did not run lately in a bucket."""
        for key in [key for key in self._forward if key[0] == bucket]:
            if self._steps - self._timed_at[key] > RECENT_TIMES:
                self._forward.rescale(key, factor)

    def _note(self, strategy: Strategy) -> None:
        """Notes that the strategy was timed in another bucket."""
        self._near.clear()
        if strategy.drafter is not None and strategy.width == 1:
            chains = self._chains.get(strategy.drafter, [])
            self._chains[strategy.drafter] = sorted({*chains, strategy.depth})

    def soften(self, drafter: str) -> None:
        """Reduces the weight of the drafter's acceptance counts, because it has new weights."""
        for (name, _), acceptance in self.acceptance.items():
            if name == drafter:
                acceptance.soften()
        self._tokens.pop(drafter, None)

    def state(self) -> dict[str, Any]:
        """Returns everything learned, as JSON."""
        return {
            "forward": [[*bucket, str(s), v] for (bucket, s), v in self._forward.items()],
            "draft": [[*bucket, str(s), v] for (bucket, s), v in self._draft.items()],
            "level": [[batch, name, v] for (batch, name), v in self._level.items()],
            "catching_up": [[batch, name, v] for (batch, name), v in self._catching_up.items()],
            "rest": [[batch, v] for batch, v in self._overhead.items()],
            "acceptance": [[name, tree, *a.counts()] for (name, tree), a in self.acceptance.items()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        forward = {(Bucket(b, c), Strategy.parse(s)): float(v) for b, c, s, v in state["forward"]}
        draft = {(Bucket(b, c), Strategy.parse(s)): float(v) for b, c, s, v in state["draft"]}
        level = {(batch, name): float(v) for batch, name, v in state["level"]}
        # states of version 0.2 have no such times
        catching_up = {(batch, name): float(v) for batch, name, v in state.get("catching_up", ())}
        rest = {batch: float(v) for batch, v in state["rest"]}
        acceptance = {}
        for name, tree, kept, tried in state["acceptance"]:
            known = acceptance[name, tree] = Acceptance(functools.partial(self._first_level, name, tree))
            known.restore(kept, tried)
        self._forward, self._draft, self._level = Times(forward), Times(draft), Times(level)
        for _, strategy in forward:
            self._note(strategy)
        self._catching_up, self._overhead = Times(catching_up), Times(rest)
        self._timed_at = dict.fromkeys(forward, self._steps)
        # buckets without plain decoding are compared with others
        buckets = sorted({bucket for bucket, _ in forward}, key=lambda b: (b, PLAIN) not in forward)
        self._scales = dict.fromkeys(buckets, 1.0)
        for bucket in buckets:
            self._scales[bucket] = self._measured_scale(bucket)
        self.acceptance.update(acceptance)
        self._tokens.clear()
