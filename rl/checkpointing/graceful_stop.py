"""Stops a run between two steps on Ctrl-C, on a signal, or when a file ``stop`` appears in its directory."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SIGNALS = (
    signal.SIGINT,  # Ctrl-C
    signal.SIGTERM,  # a launcher or a cluster
    signal.SIGUSR1,  # a cluster shortly before its time limit
)
SAME_SIGNAL_SECONDS = 1.0  # the terminal and the launcher may both deliver one Ctrl-C


def announce_stop(number: int) -> None:
    """Confirms the first stop signal on the terminal.

    Args:
        number: Number of the signal.
    """
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    print(f"\npaceline: stopping after this step; {name} again to stop now", flush=True)


class GracefulStop:
    """Records whether a run was asked to stop after its current step. It is a context manager.

    The first signal asks the run to stop after the step. A second one ends the process immediately.

    Args:
        run: The run's directory. A file ``stop`` in it has the effect of a first signal, also if another
            machine creates it.
        confirms: Whether this rank confirms the first signal on the terminal.

    Attributes:
        signal: Number of the first signal; None if there was none.
    """

    def __init__(self, run: Path, confirms: bool = True) -> None:
        self._file, self._confirms = run / "stop", confirms
        self._first_signal_time: float | None = None
        self._previous_handlers: dict[int, Any] = {}
        self.signal: int | None = None

    def __enter__(self) -> GracefulStop:
        self._file.unlink(missing_ok=True)  # left by an earlier stop of this run
        self._previous_handlers = {number: signal.signal(number, self._handle) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._previous_handlers.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        first = self._first_signal_time
        if first is not None and time.monotonic() - first > SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if first is None and self._confirms:
            announce_stop(number)
        self._first_signal_time, self.signal = first or time.monotonic(), self.signal or number

    @property
    def asked(self) -> bool:
        """Whether the run is to stop after the current step."""
        return self._first_signal_time is not None or self._file.exists()

    @property
    def status(self) -> int:
        """The exit status of a stopped run: 0 after Ctrl-C or the file, else 128 plus the signal's number.

        This is the shells' convention; a cluster sees that the run is unfinished.
        """
        return 0 if self.signal in (None, signal.SIGINT) else 128 + int(self.signal)
