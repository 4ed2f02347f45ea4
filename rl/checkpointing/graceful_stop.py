"""Ending a run between two steps: Ctrl-C, a signal of the machine's, or a file named ``stop`` in its
directory.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from types import FrameType
from typing import Any

STOP_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGUSR1,
)  # a person, a launcher or cluster, a cluster before its time limit
SAME_SIGNAL_SECONDS = 1.0  # seconds in which a terminal and a launcher may both pass on the same signal


def announce_stop(number: int) -> None:
    """Answers, in the terminal, the first signal that asks a run to stop."""
    name = "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
    print(f"\npaceline: stopping after this step; {name} again to stop now", flush=True)


class GracefulStop:
    """Whether a run was asked to stop after its present step. The first signal asks, a later one ends the
    process at once.

    Args:
        run: The run's directory: a file ``stop`` in it asks too, from wherever it is seen.
        says: Whether this rank answers in the terminal.
    """

    def __init__(self, run: Path, says: bool = True) -> None:
        self._file, self._says = run / "stop", says
        self._asked: float | None = None
        self._before: dict[int, Any] = {}
        self.signal: int | None = None

    def __enter__(self) -> GracefulStop:
        self._file.unlink(missing_ok=True)  # of a run that was stopped before
        self._before = {number: signal.signal(number, self._ask) for number in STOP_SIGNALS}
        return self

    def __exit__(self, *error: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self._asked is not None and time.monotonic() - self._asked > SAME_SIGNAL_SECONDS:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if self._asked is None and self._says:
            announce_stop(number)
        self._asked, self.signal = self._asked or time.monotonic(), self.signal or number

    @property
    def asked(self) -> bool:
        """Whether to stop once this step is over."""
        return self._asked is not None or self._file.exists()

    @property
    def status(self) -> int:
        """The exit status of a run that was stopped: 0 after a Ctrl-C or the file, else 128 and the signal's
        number, as shells have it, so that a cluster takes it for unfinished.
        """
        return 0 if self.signal in (None, signal.SIGINT) else 128 + int(self.signal)
