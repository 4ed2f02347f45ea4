"""Ending a run between two steps: Ctrl-C, or a file named ``stop`` in its directory."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

_ONE_PRESS = 2.0  # seconds in which a terminal and a launcher may both pass on the same Ctrl-C


class Interruption:
    """Whether a run was asked to stop after its present step. The first Ctrl-C asks, a later one interrupts at once.

    Args:
        run: The run's directory: a file ``stop`` in it asks too, from wherever it is seen.
        says: Whether this rank answers in the terminal.
    """

    def __init__(self, run: Path, says: bool = True) -> None:
        self._file, self._says = run / "stop", says
        self._asked: float | None = None
        self._before: Any = None

    def __enter__(self) -> Interruption:
        self._file.unlink(missing_ok=True)  # of a run that was stopped before
        self._before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *error: object) -> None:
        signal.signal(signal.SIGINT, self._before)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None and time.monotonic() - self._asked > _ONE_PRESS:
            raise KeyboardInterrupt
        if self._asked is None and self._says:
            print("\npaceline: stopping after this step; Ctrl-C again to stop now", flush=True)
        self._asked = self._asked or time.monotonic()

    @property
    def asked(self) -> bool:
        """Whether to stop once this step is over."""
        return self._asked is not None or self._file.exists()
