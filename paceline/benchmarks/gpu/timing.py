"""Times work on a GPU by CUDA events."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch


def seconds_of(run: Callable[[], Any], least: float = 0.05) -> float:
    """Returns the mean seconds of a call, by CUDA events, over calls of ``least`` seconds in total."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    count = max(int(least / (time.perf_counter() - begin)), 3)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(count):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / count / 1e3
