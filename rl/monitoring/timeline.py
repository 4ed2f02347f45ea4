"""When each rank did what in a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from paceline.rl.monitoring.metrics import Span
from paceline.rl.process.progress import Phase


class Clock:
    """Phases of a step on a clock that nobody sets: all processes of one machine read the same
    (CLOCK_MONOTONIC), and another machine's begins when it hears that the step has.

    Args:
        accelerator: Of the run. Making a clock is collective.
        shown: Shows a phase of this name to the user while it lasts.
    """

    def __init__(
        self, accelerator: Accelerator, shown: Callable[[str], AbstractContextManager[Phase]]
    ) -> None:
        self._shown = shown
        origin: list[object] = [time.monotonic(), _machine()]
        broadcast_object_list(origin)
        self._origin = float(origin[0]) if origin[1] == _machine() else time.monotonic()  # type: ignore[arg-type]
        self.spans: list[Span] = []

    def since(self, moment: float) -> float:
        """Seconds from the step's beginning to a moment, which is `time.monotonic` of a process on this
        machine.
        """
        return moment - self._origin

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Notes when a phase of this rank's step began and ended, and shows how far it is by the `Phase` that
        it yields.
        """
        begin = time.monotonic() - self._origin
        with self._shown(name) as shown:
            yield shown
        self.spans.append(Span(name, begin, time.monotonic() - self._origin))


def _machine() -> str:
    """Tells running kernels apart."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
