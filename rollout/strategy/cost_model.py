"""Estimates what a strategy costs and brings before it was tried: the warm start of the bandit."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Mapping
from statistics import median
from types import MappingProxyType
from typing import Any, TypeVar

from paceline.rollout.strategy.acceptance import Acceptance, expected_tokens
from paceline.rollout.strategy.buckets import Bucket, bucket_of
from paceline.rollout.strategy.strategy import PLAIN, StepFeedback, Strategy

K = TypeVar("K", bound=Hashable)

_RECENT_TIMES = 21  # times of which the median counts
_CHAIN_PRIOR, _TREE_PRIOR = 0.6, 0.7  # acceptance of the first level before anything was measured
_UNTIMED_MARGIN = 0.1  # share by which a strategy may be faster than its calculated time
_TIME_AGE = 1000  # steps after which a measured time is no better than a calculated one
_OLD_TIME = 250  # steps after which the next measured time replaces those before it
_TYPICAL_CONTEXT = 0.75  # the typical context of a bucket, as a share of its upper end
_DOUBT = 1.5  # standard errors that an optimistic estimate adds


class CostModel:
    """Estimates seconds and tokens of every strategy in every bucket.

    - Forward: the measured time of (bucket, strategy); if there is none, the calibrated time of that many
      tokens at that context, scaled by the ratio of measured to calibrated time in the bucket: that of plain
      decoding, or else the smallest. The machine may have been busy when it was calibrated.
    - Drafting: the measured time of (bucket, strategy); if there is none, that of a level of the same
      drafter, and at first a guess.
    - Tokens: acceptance by level of the drafter's chains or trees, over all buckets.

    Args:
        forward_seconds: Calibrated seconds of a forward: (batch, tokens of each sequence, context) → seconds.
        draft_seconds: First guess of the seconds of one draft level: (drafter, batch) → seconds.

    Attributes:
        surprised_by: The drafter whose acceptance changed by the evidence of the last step, or None.
    """

    def __init__(
        self, forward_seconds: Callable[[int, int, int], float], draft_seconds: Callable[[str, int], float]
    ) -> None:
        self._forward_guess, self._draft_guess = forward_seconds, draft_seconds
        self._forward = _Times[tuple[Bucket, Strategy]]()
        self._timed_at: dict[tuple[Bucket, Strategy], int] = {}
        self._scales: dict[Bucket, float] = {}
        self._draft = _Times[tuple[Bucket, Strategy]]()
        self._level = _Times[tuple[int, str]]()
        self._overhead = _Times[int]()
        self.acceptance: dict[tuple[str, bool], Acceptance] = {}
        self._last_drafter: str | None = None
        self._steps = 0
        self._last_seen: dict[tuple[str, bool], int] = {}
        self.surprised_by: str | None = None

    def accepted(self, strategy: Strategy) -> Acceptance:
        """Returns the acceptance estimate of the strategy's kind: its drafter's chains, or its trees."""
        assert strategy.drafter is not None
        kind = strategy.drafter, strategy.width > 1
        if kind not in self.acceptance:
            self.acceptance[kind] = Acceptance(_TREE_PRIOR if kind[1] else _CHAIN_PRIOR)
        return self.acceptance[kind]

    def tokens(self, strategy: Strategy) -> float:
        """Returns the expected tokens per sequence of a step."""
        return (
            1.0
            if strategy.drafter is None
            else expected_tokens(self.accepted(strategy).rates(strategy.depth))
        )

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
        return self._guess(strategy, bucket) * self._scales.get(bucket, 1.0)

    def _measured_scale(self, bucket: Bucket) -> float:
        """Returns the ratio of measured to calibrated time in a bucket where something was measured.

        Without plain decoding it is the smallest, and at most 1: what is then expected too fast is tried and
        measured, what is expected too slow would never be.
        """
        plain = self._forward.get((bucket, PLAIN))
        if plain is not None:
            return plain / self._guess(PLAIN, bucket)
        timed = [strategy for known, strategy in self._forward if known == bucket]
        return min(1.0, *(self._forward[bucket, s] / self._guess(s, bucket) for s in timed))

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
            Whether the step's time is representative of the strategy. A drafter's first draft after a pause
            is not, since it also reads the tokens committed meanwhile.
        """
        bucket = bucket_of(feedback.active, feedback.context)
        strategy = feedback.strategy
        self._steps += 1
        self.surprised_by = None
        ran = strategy if any(feedback.drafted) else PLAIN  # with an empty draft, the forward is a plain one
        old = self._steps - self._timed_at.get((bucket, ran), self._steps) > _OLD_TIME
        (self._forward.replace if old else self._forward.add)((bucket, ran), feedback.forward_seconds)
        self._timed_at[bucket, ran] = self._steps
        self._scales[bucket] = self._measured_scale(bucket)
        rest = feedback.total_seconds - feedback.forward_seconds - feedback.draft_seconds
        self._overhead.add(bucket.batch, rest)
        steady = strategy.drafter is None or strategy.drafter == self._last_drafter
        if strategy.drafter is not None:
            if steady:
                self._draft.add((bucket, strategy), feedback.draft_seconds)
                level = feedback.draft_seconds / strategy.depth
                self._level.add((bucket.batch, strategy.drafter), level)
            self._last_seen[strategy.drafter, strategy.width > 1] = self._steps
            if self.accepted(strategy).add(feedback.accepted, strategy.depth):
                self.surprised_by = strategy.drafter
        self._last_drafter = strategy.drafter
        return steady

    def soften(self, drafter: str) -> None:
        """Reduces the weight of the drafter's acceptance counts, because it has new weights."""
        for (name, _), acceptance in self.acceptance.items():
            if name == drafter:
                acceptance.soften()

    def state(self) -> dict[str, Any]:
        """Returns everything learned, as JSON."""
        return {
            "forward": [[*bucket, str(s), v] for (bucket, s), v in self._forward.items()],
            "draft": [[*bucket, str(s), v] for (bucket, s), v in self._draft.items()],
            "level": [[batch, name, v] for (batch, name), v in self._level.items()],
            "rest": [[batch, v] for batch, v in self._overhead.items()],
            "acceptance": [[name, tree, a.kept, a.tried] for (name, tree), a in self.acceptance.items()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores what `state` returned."""
        forward = {(Bucket(b, c), Strategy.parse(s)): float(v) for b, c, s, v in state["forward"]}
        draft = {(Bucket(b, c), Strategy.parse(s)): float(v) for b, c, s, v in state["draft"]}
        level = {(batch, name): float(v) for batch, name, v in state["level"]}
        rest = {batch: float(v) for batch, v in state["rest"]}
        acceptance = {}
        for name, tree, kept, tried in state["acceptance"]:
            known = acceptance[name, tree] = Acceptance(_TREE_PRIOR if tree else _CHAIN_PRIOR)
            known.restore(kept, tried)
        self._forward, self._draft, self._level = _Times(forward), _Times(draft), _Times(level)
        self._overhead = _Times(rest)
        self._timed_at = dict.fromkeys(forward, self._steps)
        self._scales = {bucket: self._measured_scale(bucket) for bucket in {bucket for bucket, _ in forward}}
        self.acceptance.update(acceptance)


class _Times(dict[K, float]):
    """Maps each key to the median of its latest times.

    A mean would follow outliers, which come from other work on the machine: a strategy that met one in its
    few steps would then look slow, and never run again to show otherwise.

    Args:
        medians: Saved medians, which count as one time each.
    """

    def __init__(self, medians: Mapping[K, float] = MappingProxyType({})) -> None:
        super().__init__(medians)
        self._recent = {key: deque([seconds], _RECENT_TIMES) for key, seconds in medians.items()}

    def add(self, key: K, seconds: float) -> None:
        """Adds a time."""
        recent = self._recent.setdefault(key, deque(maxlen=_RECENT_TIMES))
        recent.append(seconds)
        self[key] = median(recent)

    def replace(self, key: K, seconds: float) -> None:
        """Adds a time and drops those before it."""
        self._recent.pop(key, None)
        self.add(key, seconds)
