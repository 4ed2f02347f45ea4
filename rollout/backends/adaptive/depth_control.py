"""Chooses the draft depth of each step of a decoder that pipelines drafting and verification."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from paceline.rollout.backends.adaptive.draft_schedule import learned_schedule
from paceline.rollout.backends.adaptive.draft_watchdog import DraftWatchdog, Mode
from paceline.rollout.strategy import PLAIN, BanditSelector, CostModel, StepFeedback, Strategy
from paceline.rollout.strategy.buckets import Bucket, bucket_of, distance

T = TypeVar("T")

_BURST_STEPS = 5  # of a new choice: the first verifies drafts of the choice before it, the second may compile
_SETTLE_STEPS = 3  # steps outside a bucket after which its choice is left
_SIMILAR = 1.0  # distance of a bucket to which the batch is likely to come back
_MOST_PROMPT_SHARE = 0.1  # of a step's tokens that may be a prompt's in a step whose time counts
_LEAST_UNIFORM_SHARE = 0.9  # of sequences that must verify the chosen depth in a step whose time counts
_MOST_STRETCH = 4.0  # a step that takes longer than this multiple of the usual counts as this multiple
_LONGEST_GAP = 0.1  # seconds from a result to the next step; after more, nothing was to be decoded meanwhile
_MOST_IN_FLIGHT = 64  # steps of which no result came; more are forgotten
_COMPARISON_STEPS = 16  # steps between two comparisons with plain decoding


@dataclass(frozen=True, slots=True)
class StepShape:
    """What a scheduler put into a step.

    Attributes:
        sequences: Number of sequences, those whose prompts are read among them.
        drafted: Number of draft tokens to verify, for each sequence that decodes.
        context: Tokens of the longest sequence, those of this step included.
        prompt_tokens: Number of prompt tokens that the step reads.
        fits: Whether the drafter can draft after this step: vLLM's cannot while any sequence is within the
            maximum depth of the longest context, and its drafts are then all zeros.
    """

    sequences: int
    drafted: Sequence[int]
    context: int
    prompt_tokens: int = 0
    fits: bool = True


@dataclass(frozen=True, slots=True)
class _Scheduled:
    """A step in flight: its shape, the depths that it verifies and drafts, and when it was scheduled."""

    shape: StepShape
    verified: int
    chosen: int
    at: float


class DepthControl:
    """Decides how many tokens each step drafts, for a decoder such as vLLM's engine core.

    A step verifies the drafts that the step before it made, and makes those of the next one; several steps
    may be in flight. `scheduled` is called when a step is scheduled and returns the depth to draft,
    `finished` when its tokens are known. A `BanditSelector` learns from the steps that verified and drafted
    the same depth, by the time between two results.

    The choice depends on counts and times of earlier steps only, so that tokens keep the policy's
    distribution, see `paceline.rollout.strategy.strategy.Selector`.

    Args:
        method: vLLM's name of the drafting method, such as ``eagle3``.
        depths: Depths to choose from; 0 is always one of them.
        varies: Whether sequences may be drafted less than the chosen depth, as n-grams do.
        seed: Seed of the explorations.
        say: Called with each message of the watchdog, which is one line; None logs it.
        probe_seconds: Seconds between a verdict of the watchdog and its first probe.

    Attributes:
        selector: The bandit.
        watchdog: The judge of the drafter.
        last: Measurements of the last finished step in which sequences decoded.
        depth: Depth that the last step was told to draft.
        broken: Whether an error has switched the control off, see `guard`.
    """

    def __init__(
        self,
        method: str,
        depths: Sequence[int],
        *,
        varies: bool = False,
        seed: int = 0,
        say: Callable[[str], None] | None = None,
        probe_seconds: float = 30.0,
    ) -> None:
        self.method, self.depths = method, sorted({0, *depths})
        self._varies = varies
        self.say = say or logging.getLogger(__name__).warning
        self._arms = {depth: Strategy(method, depth) for depth in self.depths if depth} | {0: PLAIN}
        # Parts of a step are not timed, so every depth is expected to cost what plain decoding does until it
        # was timed; the unit of the guess cancels out.
        cost = CostModel(lambda batch, tokens, context: 1.0, lambda drafter, batch: 0.0)
        self.selector = BanditSelector(
            lambda name: [arm for depth, arm in self._arms.items() if depth],
            [method],
            cost,
            seed=seed,
            burst_steps=_BURST_STEPS,
            calibrated=False,
        )
        self.watchdog = DraftWatchdog(self.say, probe_seconds)
        self.last: StepFeedback | None = None
        self.depth = 0
        self.broken = False
        self._in_flight: dict[int, _Scheduled] = {}
        self._bucket: Bucket | None = None
        self._outside = 0
        self._warm: set[tuple[Bucket, int]] = set()
        self._last_result: float | None = None
        self._steps_by_depth: Counter[int] = Counter()
        self._recorded = 0
        self._mode = Mode.ON

    def guard(self, work: Callable[[], T], otherwise: T) -> T:
        """Returns what ``work`` returns, or ``otherwise`` from its first error on.

        An exception in its scheduler would kill vLLM's engine core, for a choice that only saves time.
        """
        if self.broken:
            return otherwise
        try:
            return work()
        except Exception as error:
            self.broken = True
            self.say(
                f"the choice of draft depths failed ({type(error).__name__}: {error}); until a restart, all "
                "steps draft as many tokens"
            )
            return otherwise

    def scheduled(self, key: int, shape: StepShape, now: float) -> int:
        """Returns the depth of the drafts that the step makes.

        Args:
            key: Identifies the step until it is finished.
            shape: What the step computes; one without sequences changes nothing.
            now: Seconds on the clock of all calls.
        """
        if not shape.sequences:
            return self.depth
        verified = self._verified(shape)
        self.depth = self._choose(shape, now)
        if len(self._in_flight) >= _MOST_IN_FLIGHT:
            self._in_flight.clear()
        self._in_flight[key] = _Scheduled(shape, verified, self.depth, now)
        return self.depth

    def _verified(self, shape: StepShape) -> int:
        """Returns the depth that most sequences verify; −1 if they differ too much."""
        if self._varies or not shape.drafted:
            return self.depth
        depth, count = Counter(shape.drafted).most_common(1)[0]
        return depth if count >= _LEAST_UNIFORM_SHARE * len(shape.drafted) else -1

    def _choose(self, shape: StepShape, now: float) -> int:
        before, self._mode = self._mode, self.watchdog.mode(now)
        mode = self._mode
        if mode is Mode.PROBE and before is Mode.OFF:  # what was learned of the drafter may be outdated
            self.selector.drafter_changed(self.method)
        if mode is Mode.OFF or not shape.fits:
            return 0
        if mode is Mode.PROBE:
            return self.depths[1]
        bucket = self._settled(bucket_of(shape.sequences, shape.context))
        clean = shape.prompt_tokens <= _MOST_PROMPT_SHARE * _decoded(shape)
        return self.selector.choose(bucket.batch, bucket.context, explore=clean).depth

    def _settled(self, bucket: Bucket) -> Bucket:
        """Returns the bucket whose choice counts; into a similar one it follows the steps with a delay.

        If the batch size alternated between two buckets with different choices, no step would ever verify
        the depth that it drafts.
        """
        self._outside = self._outside + 1 if bucket != self._bucket else 0
        if (
            self._bucket is None
            or self._outside >= _SETTLE_STEPS
            or distance(bucket, self._bucket) > _SIMILAR
        ):
            self._bucket, self._outside = bucket, 0
        return self._bucket

    def finished(self, key: int, committed: Sequence[int], now: float, busy: bool) -> None:
        """Learns from a step.

        Args:
            key: The key with which it was scheduled.
            committed: Number of tokens that each decoding sequence got, in the order of `StepShape.drafted`.
            now: Seconds on the clock of all calls.
            busy: Whether sequences are left to decode, so that the next step begins now.
        """
        step = self._in_flight.pop(key, None)
        since, self._last_result = self._last_result, now if busy else None
        self.last = None
        if step is None or not committed:
            return
        drafted = step.shape.drafted
        accepted = [max(tokens - 1, 0) for tokens in committed]
        drafts = [kept for kept, width in zip(accepted, drafted, strict=True) if width]
        self.watchdog.observe(len(drafts), sum(drafts), now)
        self._steps_by_depth[max(drafted)] += 1
        if since is None or step.at - since > _LONGEST_GAP:  # all requests may have been aborted
            since = step.at
        seconds = now - since
        self.last = self._feedback(step, accepted, sum(committed), seconds)
        if self._counts(step):
            self._record(self.last)

    def _feedback(
        self, step: _Scheduled, accepted: list[int], committed: int, seconds: float
    ) -> StepFeedback:
        strategy = self._arms.get(step.verified, PLAIN)
        active, context = len(accepted), step.shape.context
        bucket = bucket_of(active, context)
        if self.selector.cost.timed(strategy, bucket):
            seconds = min(seconds, _MOST_STRETCH * self.selector.cost.seconds(strategy, bucket))
        return StepFeedback(
            strategy, active, context, step.shape.drafted, accepted, committed, 0.0, seconds, seconds
        )

    def _counts(self, step: _Scheduled) -> bool:
        """Whether the step's time tells what its depth costs."""
        prompts = step.shape.prompt_tokens > _MOST_PROMPT_SHARE * _decoded(step.shape)
        if step.verified != step.chosen or prompts:
            return False
        kind = bucket_of(len(step.shape.drafted), step.shape.context), step.verified
        if kind not in self._warm:  # kernels may be compiled for this depth
            self._warm.add(kind)
            return False
        return True

    def _record(self, feedback: StepFeedback) -> None:
        self.selector.record(feedback)
        self._recorded += 1
        if self._recorded % _COMPARISON_STEPS == 0 and self.watchdog.speculates:
            bucket = bucket_of(feedback.active, feedback.context)
            if self.selector.cost.timed(PLAIN, bucket):
                plain, *drafted = (self.selector.rate(self._arms[depth], bucket) for depth in self.depths)
                self.watchdog.compare(bucket, plain * feedback.active, max(drafted) * feedback.active)

    def interrupted(self) -> None:
        """Notes that steps stop for a while: the time until the next result is none of its own."""
        self._last_result = None

    def drafter_changed(self) -> None:
        """Notes that the drafter has new weights."""
        self.selector.drafter_changed(self.method)
        self.watchdog.weights_changed()

    def policy_changed(self) -> None:
        """Notes that the policy, and perhaps the drafter, has new weights."""
        self.interrupted()
        self.watchdog.weights_changed()

    def schedule(self) -> list[tuple[int, int, int]]:
        """Returns the best depth of each batch size seen, see `learned_schedule`."""
        return learned_schedule(self.selector.best_arms())

    def status(self) -> dict[str, Any]:
        """Returns what is of interest from outside, as JSON."""
        return {
            "method": self.method,
            "depths": self.depths,
            "draft_depth": self.depth,
            "acceptance_length": self.watchdog.acceptance_length,
            "speculation_on": self.watchdog.speculates and not self.broken,
            "watchdog_trips": self.watchdog.trips,
            "steps_by_depth": {str(depth): steps for depth, steps in sorted(self._steps_by_depth.items())},
            "schedule": self.schedule(),
        }

    def state(self) -> dict[str, Any]:
        """Returns everything learned, as JSON."""
        return {"method": self.method, "depths": self.depths, "selector": self.selector.state()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from what `state` returned.

        Raises:
            ValueError: The state is of another method or other depths, or no state; nothing is taken over.
        """
        if state.get("method") != self.method or state.get("depths") != self.depths:
            raise ValueError(
                f"it was learned with {state.get('method')} and depths {state.get('depths')}, not with "
                f"{self.method} and {self.depths}"
            )
        self.selector.load_state(state.get("selector", {}))


def _decoded(shape: StepShape) -> int:
    """Returns the number of tokens that a step computes for sequences that decode."""
    return len(shape.drafted) + sum(shape.drafted)
