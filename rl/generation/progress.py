"""Shows how far a rank's rollouts are."""

from __future__ import annotations

import time

from paceline.rl.process.progress import Phase
from paceline.rollout import StepRecord


class RolloutProgress:
    """Shows how many of a rank's sequences have ended and how fast it decodes, while the engine does.

    Args:
        phase: Where it is shown.
        sequences: That the engine was given.
    """

    def __init__(self, phase: Phase, sequences: int) -> None:
        self._phase, self._sequences = phase, sequences
        self._begin, self._tokens, self._ended = time.perf_counter(), 0, 0

    def on_step(self, record: StepRecord) -> None:
        """The engine's callback after each decode step."""
        self._tokens += record.committed
        speed = self._tokens / max(time.perf_counter() - self._begin, 1e-9)
        note = f"{speed:.0f} tokens/s, {record.active} active, {record.strategy}"
        self._phase.update(self._ended, note, self._sequences, "sequences")

    def on_finish(self, *_: object) -> None:
        """The engine's callback when a sequence has ended."""
        self._ended += 1
