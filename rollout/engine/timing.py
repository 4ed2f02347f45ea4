"""Timing of the parts of a decode step, without waiting for a GPU inside the step."""

from __future__ import annotations

import itertools
import time

import torch


class StepClock:
    """Measures the parts of a step between marks.

    On a GPU the marks are CUDA events, which are read once the step's results have been fetched. The last
    part contains that fetch: the host's clock says when it ends, and no event has to be waited for.

    Args:
        device: Device that the parts run on.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        self._events: list[torch.cuda.Event] = []
        self._times: list[float] = []
        self.mark()

    def mark(self) -> None:
        """Ends one part and begins the next."""
        if self._stream is not None:
            event = torch.cuda.Event(enable_timing=True)
            event.record(self._stream)
            self._events.append(event)
        self._times.append(time.perf_counter())

    def seconds(self) -> list[float]:
        """Returns the seconds of each part; on a GPU, the last part must have fetched a result."""
        if self._stream is not None:
            parts = [a.elapsed_time(b) / 1e3 for a, b in itertools.pairwise(self._events[:-1])]
            return [*parts, max(self._times[-1] - self._times[0] - sum(parts), 0.0)]
        return [b - a for a, b in itertools.pairwise(self._times)]
