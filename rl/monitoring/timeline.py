"""Records when each phase of a rank's step began and ended."""

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
    """Times the phases of a step on a monotonic clock. Creating an instance is collective.

    All processes of one machine share the clock (CLOCK_MONOTONIC) and rank 0's start of the step. On another
    machine the step starts when that machine receives rank 0's broadcast.

    Args:
        accelerator: The run's accelerator.
        shown: Function that returns a context manager to show a phase, from the phase's name.

    Attributes:
        spans: Phases that have ended, in order.
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
        """Returns the seconds from the start of the step to a moment.

        Args:
            moment: Value of `time.monotonic` in a process on this machine.
        """
        return moment - self._origin

    @contextmanager
    def phase(self, name: str) -> Iterator[Phase]:
        """Records when the block began and ended, and yields the `Phase` that shows its progress.

        Args:
            name: Name of the phase.
        """
        begin = time.monotonic() - self._origin
        with self._shown(name) as shown:
            yield shown
        self.spans.append(Span(name, begin, time.monotonic() - self._origin))


def _machine() -> str:
    """Returns an id of the running kernel; it is empty if there is none."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
