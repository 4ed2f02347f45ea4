"""When each rank did what in a step."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from rl.metrics import Span


class Clock:
    """Phases of a step on a clock that the ranks of one machine share."""

    def __init__(self, accelerator: Accelerator) -> None:
        origin = [time.time()]
        broadcast_object_list(origin)
        self._origin = origin[0]
        self.spans: list[Span] = []

    def since(self, moment: float) -> float:
        """Seconds from the step's beginning to a moment, which is in seconds since the epoch."""
        return moment - self._origin

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.time() - self._origin
        yield
        self.spans.append(Span(name, begin, time.time() - self._origin))
