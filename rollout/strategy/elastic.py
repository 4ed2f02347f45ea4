"""Whether to speculate and how deep, from measured times: the expected tokens a second of every choice."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rollout.strategy.strategy import PLAIN, StepFeedback, Strategy

_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)
_DECAY = 0.95
_PROBE_EVERY, _PROBE_STEPS, _PROBE_DEPTH = 48, 4, 3
_PRIOR_ACCEPT = 0.6
_PRIOR_WEIGHT = 4.0


def batch_bucket(active: int) -> int:
    """The bucket of a batch size: the smallest power of two that holds it."""
    return next((b for b in _BATCHES if active <= b), _BATCHES[-1])


class _Mean:
    """Exponentially weighted mean, started from the first value."""

    def __init__(self) -> None:
        self.value: float | None = None

    def add(self, x: float, decay: float = 0.8) -> None:
        self.value = x if self.value is None else decay * self.value + (1 - decay) * x


class _Acceptance:
    """Estimate of P(draft token i is kept | those before it were), with a prior that fades.

    A sequence that was offered fewer tokens than asked counts as a miss at the first one missing: an empty proposal costs
    the same forward as a wrong one.
    """

    def __init__(self, depth: int) -> None:
        self.kept = [_PRIOR_ACCEPT * _PRIOR_WEIGHT] * depth
        self.tried = [_PRIOR_WEIGHT] * depth

    def add(self, accepted: Sequence[int], depth: int) -> None:
        for i in range(depth):
            reached = sum(a >= i for a in accepted)
            if reached:
                fade = _DECAY ** min(reached, 8)
                self.kept[i] = fade * self.kept[i] + sum(a > i for a in accepted)
                self.tried[i] = fade * self.tried[i] + reached

    def doubt(self) -> None:
        """Keeps what was learned but gives it no more weight than the prior: it may be out of date."""
        for i, tried in enumerate(self.tried):
            self.kept[i] *= min(_PRIOR_WEIGHT / tried, 1.0)
            self.tried[i] = min(tried, _PRIOR_WEIGHT)

    def soften(self) -> None:
        """Shrinks the weight of what was seen to that of the prior, and mixes the prior in by half."""
        for i, (kept, tried) in enumerate(zip(self.kept, self.tried, strict=True)):
            self.kept[i] = _PRIOR_WEIGHT / 2 * (kept / tried + _PRIOR_ACCEPT)
            self.tried[i] = _PRIOR_WEIGHT

    def expected_tokens(self, depth: int) -> float:
        """Tokens one step commits for each sequence: 1 + Σ_i Π_{j≤i} P(keep j) (Leviathan et al., arXiv 2211.17192, eq. 1,
        with a probability for each position)."""
        total, running = 1.0, 1.0
        for i in range(depth):
            running *= self.kept[i] / self.tried[i]
            total += running
        return total


class ElasticSelector:
    """Picks the depth and drafter with the most expected tokens a second at this batch size.

    Time of a choice = measured forward time at (batch bucket, tokens of each sequence) + drafting time + overhead; tokens =
    `_Acceptance.expected_tokens`. Forward times start from a calibration run and are corrected by every step. A
    drafter that was not chosen for 48 steps is tried for four, if it could pay at all, so that one that has become better, or text
    that suits another one, is noticed.

    Args:
        drafters: Names to choose from.
        max_depth: Deepest chain.
        forward_seconds: Calibrated seconds of a forward of (batch bucket, tokens of each sequence).
        draft_seconds: First guess of the seconds to propose one token of one drafter: (name, batch bucket) → seconds.
    """

    def __init__(
        self,
        drafters: Sequence[str],
        max_depth: int,
        forward_seconds: Callable[[int, int], float],
        draft_seconds: Callable[[str, int], float],
    ) -> None:
        self.max_depth = max_depth
        self._forward_guess = forward_seconds
        self._draft_guess = draft_seconds
        self._forward: dict[tuple[int, Strategy], _Mean] = {}
        self._draft: dict[tuple[str, int], _Mean] = {}
        self._overhead: dict[int, _Mean] = {}
        self._acceptance = {name: _Acceptance(max_depth) for name in drafters}
        self._idle: dict[str, int] = {}
        self._last_drafter: str | None = None

    def choose(self, active: int, context: int) -> Strategy:
        bucket = batch_bucket(active)
        plain = 1.0 / self._seconds(PLAIN, bucket)
        best, rate = PLAIN, plain
        for strategy in self._speculative():
            candidate = self._rate(strategy, bucket)
            if candidate > rate:
                best, rate = strategy, candidate
        return self._probe(best, bucket, plain) or best

    def _probe(self, best: Strategy, bucket: int, plain: float) -> Strategy | None:
        """A few steps of a drafter that has not run for long, where it could pay: text and drafters change."""
        for name, acceptance in self._acceptance.items():
            if name == best.drafter:
                self._idle[name] = 0
                continue
            self._idle[name] = self._idle.get(name, 0) + 1
            if self._idle[name] <= _PROBE_EVERY:
                continue
            if not self._could_pay(name, bucket, plain):
                self._idle[name] = _PROBE_EVERY  # its turn comes at the first batch where it could
                continue
            if self._idle[name] == _PROBE_EVERY + 1:
                acceptance.doubt()
            if self._idle[name] == _PROBE_EVERY + _PROBE_STEPS:
                self._idle[name] = 0
            return Strategy(name, min(_PROBE_DEPTH, self.max_depth))
        return None

    def _speculative(self) -> list[Strategy]:
        return [Strategy(name, depth) for name in self._acceptance for depth in range(1, self.max_depth + 1)]

    def _rate(self, strategy: Strategy, bucket: int) -> float:
        assert strategy.drafter is not None
        return self._acceptance[strategy.drafter].expected_tokens(strategy.depth) / self._seconds(strategy, bucket)

    def _could_pay(self, name: str, bucket: int, plain: float) -> bool:
        """Whether some depth would beat plain decoding if three of four draft tokens were kept."""
        depths = (Strategy(name, depth) for depth in range(1, self.max_depth + 1))
        return any(sum(0.75**i for i in range(s.depth + 1)) / self._seconds(s, bucket) > plain for s in depths)

    def _seconds(self, strategy: Strategy, bucket: int) -> float:
        return (
            self._forward_time(bucket, strategy)
            + self._draft_time(strategy.drafter, bucket) * strategy.depth
            + (self._overhead[bucket].value or 0.0 if bucket in self._overhead else 0.0)
        )

    def _forward_time(self, bucket: int, strategy: Strategy) -> float:
        """Measured where it was; else the calibrated ratio of this width to plain decoding times what plain decoding takes now.

        By strategy and not by width alone: a drafter that proposes nothing for some sequences makes a smaller forward.
        """
        measured = self._forward.get((bucket, strategy))
        if measured is not None and measured.value is not None:
            return measured.value
        plain = self._forward.get((bucket, PLAIN))
        scale = plain.value / self._forward_guess(bucket, 1) if plain is not None and plain.value is not None else 1.0
        return self._forward_guess(bucket, strategy.depth + 1) * scale

    def _draft_time(self, drafter: str | None, bucket: int) -> float:
        if drafter is None:
            return 0.0
        measured = self._draft.get((drafter, bucket))
        return measured.value if measured is not None and measured.value is not None else self._draft_guess(drafter, bucket)

    def record(self, feedback: StepFeedback) -> None:
        bucket = batch_bucket(feedback.active)
        ran = feedback.strategy if feedback.width > 1 else PLAIN
        self._forward.setdefault((bucket, ran), _Mean()).add(feedback.forward_seconds)
        rest = feedback.total_seconds - feedback.forward_seconds - feedback.draft_seconds
        self._overhead.setdefault(bucket, _Mean()).add(rest)
        strategy = feedback.strategy
        if strategy.drafter is not None:
            # The first draft after a pause also reads what was committed meanwhile: no measure of those that follow.
            if strategy.drafter == self._last_drafter:
                self._draft.setdefault((strategy.drafter, bucket), _Mean()).add(feedback.draft_seconds / strategy.depth)
            self._acceptance[strategy.drafter].add(feedback.accepted, strategy.depth)
        self._last_drafter = strategy.drafter

    def drafter_changed(self, name: str) -> None:
        """A new drafter starts from the prior; new weights of a known one leave what was learned as a weaker prior."""
        known = self._acceptance.get(name)
        if known is None:
            self._acceptance[name] = _Acceptance(self.max_depth)
        else:
            known.soften()
