"""Switches speculation off while the drafter is dead, and reports drafts that are slower than none."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from enum import Enum

from paceline.rollout.strategy.buckets import Bucket

_EVIDENCE_DRAFTS = 200  # drafts of a verdict: a drafter of length 1.1 is mistaken for dead once in 200 times
_PROBE_DRAFTS = 64  # drafts of a probe
_SUSPECT_DRAFTS = 32  # drafts of a suspicion: drafting goes on until there is a verdict
_DEAD_LENGTH = 1.05  # acceptance length below which no drafter saves the time of its own forward
_ALIVE_LENGTH = 1.1  # a probe must reach more than `_DEAD_LENGTH`, so that the verdict does not alternate
_MAX_PAUSE_FACTOR = 16  # pauses between probes double up to this multiple of the first
_SLOW_COMPARISONS = 16  # comparisons in a row, of one bucket, that drafts must lose to be reported as slow
_SLOW_MARGIN = 1.02  # less than this is within the noise of measured times
_FADE = 0.98  # factor on older drafts in the reported acceptance length: about 50 steps are remembered


class Mode(Enum):
    """What the watchdog lets a step draft."""

    ON = "on"
    OFF = "off"
    PROBE = "probe"


class DraftWatchdog:
    """Judges a drafter by its acceptance length, the mean number of tokens that a step commits with a draft.

    A drafter with zero, broken or outdated weights has an acceptance length of nearly 1: after 200 such
    drafts speculation is switched off. It is probed after a pause, which doubles with every failed probe, and
    at once when weights change.

    Args:
        say: Called with each message, which is one line.
        probe_seconds: Seconds before the first probe.

    Attributes:
        trips: Number of verdicts by reason: ``dead`` for a drafter whose drafts are rejected, ``slow`` for
            drafts that are slower than plain decoding.
    """

    def __init__(self, say: Callable[[str], None], probe_seconds: float = 30.0) -> None:
        self._say, self._first_pause = say, probe_seconds
        self._mode, self._pause, self._probe_at = Mode.ON, probe_seconds, 0.0
        self._steps: deque[tuple[int, int]] = deque(maxlen=_EVIDENCE_DRAFTS)  # (drafts, accepted) of each
        self._recent_drafts = self._recent_accepted = 0.0
        self._lost: dict[Bucket, int] = {}
        self.trips = {"dead": 0, "slow": 0}

    @property
    def speculates(self) -> bool:
        """Whether speculation is on; it is off during a probe, too."""
        return self._mode is Mode.ON

    @property
    def acceptance_length(self) -> float:
        """The mean number of tokens that recent steps committed with a draft; 1 without any."""
        return 1 + self._recent_accepted / max(self._recent_drafts, 1e-9)

    def mode(self, now: float) -> Mode:
        """Returns what the next step may draft.

        Args:
            now: Seconds on the clock of all calls.
        """
        if self._mode is Mode.OFF and now >= self._probe_at:
            self._enter(Mode.PROBE)
        drafts, length = self._latest(_SUSPECT_DRAFTS)
        return Mode.PROBE if drafts >= _SUSPECT_DRAFTS and length < _DEAD_LENGTH else self._mode

    def _latest(self, count: int) -> tuple[int, float]:
        """Returns the number and the length of the last ``count`` drafts, or of all if there are fewer."""
        drafts = accepted = 0
        for more, kept in reversed(self._steps):
            drafts, accepted = drafts + more, accepted + kept
            if drafts >= count:
                break
        return drafts, 1 + accepted / max(drafts, 1)

    def observe(self, drafts: int, accepted: int, now: float) -> None:
        """Judges the drafter by one more step.

        Args:
            drafts: Number of sequences whose drafts were verified.
            accepted: Number of draft tokens that were accepted, over all sequences.
            now: Seconds on the clock of all calls.
        """
        if not drafts or self._mode is Mode.OFF:  # steps that were in flight when it was switched off
            return
        self._recent_drafts = _FADE * self._recent_drafts + drafts
        self._recent_accepted = _FADE * self._recent_accepted + accepted
        self._steps.append((drafts, accepted))
        probing = self._mode is Mode.PROBE
        needed = _PROBE_DRAFTS if probing else _EVIDENCE_DRAFTS
        judged, length = self._latest(needed)
        if judged < needed:
            return
        if probing:
            self._judge_probe(judged, length, now)
        elif length < _DEAD_LENGTH:
            self._trip(judged, length, now)

    def _judge_probe(self, drafts: int, length: float, now: float) -> None:
        if length >= _ALIVE_LENGTH:
            self._say(f"speculation is on again: the acceptance length of {drafts} drafts is {length:.2f}")
            self._pause = self._first_pause
            self._enter(Mode.ON)
        else:
            self._pause = min(2 * self._pause, _MAX_PAUSE_FACTOR * self._first_pause)
            self._probe_at = now + self._pause
            self._enter(Mode.OFF)

    def _trip(self, drafts: int, length: float, now: float) -> None:
        self.trips["dead"] += 1
        self._say(
            f"speculation is off: the acceptance length of {drafts} drafts is {length:.3f}, below "
            f"{_DEAD_LENGTH}; are the drafter's weights those of this policy? It is tried again after "
            f"{self._pause:g} s, and when weights change"
        )
        self._probe_at = now + self._pause
        self._enter(Mode.OFF)

    def _enter(self, mode: Mode) -> None:
        self._mode = mode
        self._steps.clear()

    def weights_changed(self) -> None:
        """Drops the evidence; a drafter that is switched off is probed at once."""
        self._pause, self._probe_at = self._first_pause, 0.0
        self._enter(self._mode)

    def compare(self, bucket: Bucket, plain: float, drafted: float) -> None:
        """Reports once when drafts are slower than none in a bucket, and once when they no longer are.

        Nothing is switched off: the bandit that has these rates decodes plainly there, and its explorations
        are the probes.

        Args:
            bucket: Bucket of the step.
            plain: Tokens per second of plain decoding.
            drafted: Tokens per second of the best depth.
        """
        lost = self._lost.get(bucket, 0)
        if plain > _SLOW_MARGIN * drafted:
            self._lost[bucket] = lost + 1
            if lost + 1 == _SLOW_COMPARISONS:
                self.trips["slow"] += 1
                self._say(
                    f"drafts do not pay for batches of up to {bucket.batch} and contexts of up to "
                    f"{bucket.context}: {drafted:.1f} tokens per second with the best depth, {plain:.1f} "
                    "without drafts; they decode plainly"
                )
        elif drafted > plain:
            self._lost[bucket] = 0
            if lost >= _SLOW_COMPARISONS:
                self._say(
                    f"drafts pay again for batches of up to {bucket.batch} and contexts of up to "
                    f"{bucket.context}: {drafted:.1f} tokens per second, {plain:.1f} without drafts"
                )
