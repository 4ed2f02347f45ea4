"""What a strategy should cost and bring, before it was tried: the bandit's warm start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from paceline.rollout.strategy.buckets import Bucket, bucket_of
from paceline.rollout.strategy.strategy import PLAIN, StepFeedback, Strategy

_DECAY = 0.99  # of acceptance counts, for each sequence and step: about 100 drafts are remembered
_MOST_FADE = 8
_TIME_DECAY = 0.85
_PRIOR_WEIGHT = 4.0
_PRIOR_CHAIN, _PRIOR_TREE = 0.6, 0.7
_RECENT_DECAY, _LEAST_RECENT, _SURPRISE = 0.9, 6.0, 3.0
_AGING = 0.99
_WITHIN = 0.75  # where in a bucket of contexts the typical one is
_DOUBT = 1.5
_UNKNOWN = 0.25  # variance that a rate may have although it was never seen to vary


class Acceptance:
    """Estimate of P(level i of a draft is accepted | the levels above were), with a prior that fades.

    A sequence that was offered fewer levels than asked counts as a miss at the first one missing: an empty
    proposal costs the same forward as a wrong one. Beside the counts that remember about 100 drafts runs a
    copy that remembers about 10; where the two differ by more than chance allows, the long memory is dropped.
    """

    def __init__(self, prior: float) -> None:
        self._prior = prior
        self.kept: list[float] = []
        self.tried: list[float] = []
        self._recent: list[tuple[float, float]] = []

    def add(self, accepted: Sequence[int], depth: int) -> bool:
        """One step's accepted levels of each sequence. Returns whether they no longer fit what was known."""
        self._reach(depth)
        changed = False
        for i in range(depth):
            reached, taken = sum(a >= i for a in accepted), sum(a > i for a in accepted)
            if not reached:
                break
            fade = _DECAY ** min(reached, _MOST_FADE)
            recent = _RECENT_DECAY ** min(reached, _MOST_FADE)
            self._recent[i] = recent * self._recent[i][0] + taken, recent * self._recent[i][1] + reached
            self.kept[i] = fade * self.kept[i] + taken
            self.tried[i] = fade * self.tried[i] + reached
            changed |= self._differs(i)
        if changed:
            for i, (kept, tried) in enumerate(self._recent):
                if tried >= 1:  # what comes next shall weigh more than what led here
                    self.kept[i], self.tried[i] = _PRIOR_WEIGHT * kept / tried, _PRIOR_WEIGHT
        return changed

    def _differs(self, level: int) -> bool:
        kept, tried = self._recent[level]
        if tried < _LEAST_RECENT:
            return False
        usual = min(max(self.kept[level] / self.tried[level], 0.05), 0.95)
        return abs(kept / tried - usual) > _SURPRISE * (usual * (1 - usual) / tried) ** 0.5

    def _reach(self, depth: int) -> None:
        while len(self.kept) < depth:
            # unknown levels start from what the one above has shown
            last = self.kept[-1] / self.tried[-1] if self.kept else self._prior
            self.kept.append(_PRIOR_WEIGHT * last)
            self.tried.append(_PRIOR_WEIGHT)
            self._recent.append((0.0, 0.0))

    def soften(self) -> None:
        """Shrinks the weight of what was seen to that of the prior: it may be out of date."""
        for i, tried in enumerate(self.tried):
            self.kept[i] *= min(_PRIOR_WEIGHT / tried, 1.0)
            self.tried[i] = min(tried, _PRIOR_WEIGHT)

    def restore(self, kept: Sequence[float], tried: Sequence[float]) -> None:
        """Takes over counts."""
        self.kept, self.tried = [float(k) for k in kept], [float(t) for t in tried]
        self._recent = [(0.0, 0.0)] * len(self.kept)

    def rates(self, depth: int, doubt: float = 0.0, idle: int = 0) -> list[float]:
        """P(level i is accepted | those above were) for each level.

        Args:
            depth: Levels.
            doubt: Standard errors to add, for what the rates may be at best.
            idle: Steps since anything was seen: what is known of a moving policy ages.
        """
        self._reach(depth)
        rates = []
        for kept, tried in zip(self.kept[:depth], self.tried, strict=False):
            rate = kept / tried
            spread = (rate * (1 - rate) + _UNKNOWN) / (tried * _AGING**idle)
            rates.append(min(rate + doubt * spread**0.5, 0.95) if doubt else rate)
        return rates


def expected_tokens(rates: Sequence[float]) -> float:
    """Tokens one step commits for each sequence: 1 + Σ_i Π_{j≤i} P(level j) (Leviathan et al., arXiv
    2211.17192, eq. 1, with a probability for each level).
    """
    total, running = 1.0, 1.0
    for rate in rates:
        running *= rate
        total += running
    return total


class CostModel:
    """Seconds and tokens of every strategy in every bucket: measured where it ran, else from what is alike.

    - Forward: by (bucket, strategy) where measured; else the calibrated time of that many tokens at that
      context, scaled by what plain decoding in the bucket takes now against its calibration.
    - Drafting: by (bucket, strategy) where measured; else by level of the same drafter, else a first guess.
    - Tokens: acceptance by level of the drafter's chains or trees, over all buckets.

    Args:
        forward_seconds: Calibrated seconds of a forward: (batch, tokens of each sequence, context) → seconds.
        draft_seconds: First guess of the seconds of one level of a draft: (drafter, batch) → seconds.

    Attributes:
        surprised_by: The drafter whose acceptance the last step showed to have changed, if it did.
    """

    def __init__(
        self, forward_seconds: Callable[[int, int, int], float], draft_seconds: Callable[[str, int], float]
    ) -> None:
        self._forward_guess, self._draft_guess = forward_seconds, draft_seconds
        self._forward: dict[tuple[Bucket, Strategy], float] = {}
        self._draft: dict[tuple[Bucket, Strategy], float] = {}
        self._level: dict[tuple[int, str], float] = {}
        self._rest: dict[int, float] = {}
        self.acceptance: dict[tuple[str, bool], Acceptance] = {}
        self._last_drafter: str | None = None
        self._steps = 0
        self._last_seen: dict[tuple[str, bool], int] = {}
        self.surprised_by: str | None = None

    def accepted(self, strategy: Strategy) -> Acceptance:
        """Acceptance of the strategy's kind: its drafter's chains, or its trees."""
        assert strategy.drafter is not None
        kind = strategy.drafter, strategy.width > 1
        if kind not in self.acceptance:
            self.acceptance[kind] = Acceptance(_PRIOR_TREE if kind[1] else _PRIOR_CHAIN)
        return self.acceptance[kind]

    def tokens(self, strategy: Strategy) -> float:
        """Expected tokens of a sequence and step."""
        return (
            1.0
            if strategy.drafter is None
            else expected_tokens(self.accepted(strategy).rates(strategy.depth))
        )

    def optimistic_tokens(self, strategy: Strategy) -> float:
        """What they may turn out to be: 1.5 standard errors more, which grow with the time since the drafter
        last ran.
        """
        if strategy.drafter is None:
            return 1.0
        idle = self._steps - self._last_seen.get((strategy.drafter, strategy.width > 1), 0)
        return expected_tokens(self.accepted(strategy).rates(strategy.depth, _DOUBT, idle))

    def seconds(self, strategy: Strategy, bucket: Bucket) -> float:
        """Expected seconds of a step."""
        return (
            self._forward_seconds(strategy, bucket)
            + self._draft_seconds(strategy, bucket)
            + self._rest.get(bucket.batch, 0.0)
        )

    def has_timed(self, strategy: Strategy, bucket: Bucket) -> bool:
        """Whether the strategy's forward was measured in the bucket."""
        return (bucket, strategy) in self._forward

    def _forward_seconds(self, strategy: Strategy, bucket: Bucket) -> float:
        measured = self._forward.get((bucket, strategy))
        if measured is not None:
            return measured
        plain = self._forward.get((bucket, PLAIN))
        scale = 1.0 if plain is None else plain / self._guess(PLAIN, bucket)
        return self._guess(strategy, bucket) * scale

    def _guess(self, strategy: Strategy, bucket: Bucket) -> float:
        return self._forward_guess(bucket.batch, strategy.nodes + 1, int(_WITHIN * bucket.context))

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
        """Learns from a step. Returns whether its time says what the strategy costs: a drafter's first draft
        after a pause also reads what was committed meanwhile.
        """
        bucket = bucket_of(feedback.active, feedback.context)
        strategy = feedback.strategy
        self._steps += 1
        self.surprised_by = None
        ran = strategy if any(feedback.drafted) else PLAIN  # an empty draft makes a plain forward
        _mix(self._forward, (bucket, ran), feedback.forward_seconds)
        _mix(
            self._rest,
            bucket.batch,
            feedback.total_seconds - feedback.forward_seconds - feedback.draft_seconds,
        )
        steady = strategy.drafter is None or strategy.drafter == self._last_drafter
        if strategy.drafter is not None:
            if steady:
                _mix(self._draft, (bucket, strategy), feedback.draft_seconds)
                _mix(self._level, (bucket.batch, strategy.drafter), feedback.draft_seconds / strategy.depth)
            self._last_seen[strategy.drafter, strategy.width > 1] = self._steps
            if self.accepted(strategy).add(feedback.accepted, strategy.depth):
                self.surprised_by = strategy.drafter
        self._last_drafter = strategy.drafter
        return steady

    def soften(self, drafter: str) -> None:
        """The drafter has new weights."""
        for (name, _), acceptance in self.acceptance.items():
            if name == drafter:
                acceptance.soften()

    def state(self) -> dict[str, Any]:
        """All that was learned, as JSON."""
        return {
            "forward": [[*bucket, str(s), v] for (bucket, s), v in self._forward.items()],
            "draft": [[*bucket, str(s), v] for (bucket, s), v in self._draft.items()],
            "level": [[batch, name, v] for (batch, name), v in self._level.items()],
            "rest": [[batch, v] for batch, v in self._rest.items()],
            "acceptance": [[name, tree, a.kept, a.tried] for (name, tree), a in self.acceptance.items()],
        }

    def load_state(self, state: dict[str, Any]) -> None:
        """Takes over what `state` gave."""
        forward = {(Bucket(b, c), Strategy.parse(s)): float(v) for b, c, s, v in state["forward"]}
        draft = {(Bucket(b, c), Strategy.parse(s)): float(v) for b, c, s, v in state["draft"]}
        level = {(batch, name): float(v) for batch, name, v in state["level"]}
        rest = {batch: float(v) for batch, v in state["rest"]}
        acceptance = {}
        for name, tree, kept, tried in state["acceptance"]:
            known = acceptance[name, tree] = Acceptance(_PRIOR_TREE if tree else _PRIOR_CHAIN)
            known.restore(kept, tried)
        self._forward, self._draft, self._level, self._rest = forward, draft, level, rest
        self.acceptance.update(acceptance)


def _mix(means: dict[Any, float], key: Any, value: float) -> None:
    """Exponentially weighted mean, started from the first value."""
    means[key] = _TIME_DECAY * means[key] + (1 - _TIME_DECAY) * value if key in means else value
