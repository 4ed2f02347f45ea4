"""Learning-rate schedules over a known number of steps."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine", "rex"]


def rate_at(step: int, steps: int, warmup: int, schedule: Schedule) -> float:
    """Returns the factor on the learning rate in a step: a linear warm-up, then the schedule.

    ``rex`` is (1 − z) / (1/2 + (1 − z) / 2) at the share z of the remaining steps (Chen et al., "REX:
    Revisiting Budgeted Training with an Improved Schedule", arXiv 2107.04197). It stays above the linear
    schedule and falls fast at the end.

    Args:
        step: Index of the step, from 0.
        steps: Number of steps of the run.
        warmup: Number of warm-up steps; the first one has 1 / warmup of the rate.
        schedule: ``constant`` (a factor of 1), ``linear``, ``cosine`` or ``rex``.
    """
    if step + 1 < warmup:
        return (step + 1) / warmup
    passed = min(max(step - max(warmup - 1, 0), 0) / max(steps - max(warmup - 1, 0), 1), 1.0)
    if schedule == "linear":
        return 1 - passed
    if schedule == "cosine":
        return (1 + math.cos(math.pi * passed)) / 2
    if schedule == "rex":
        return (1 - passed) / (0.5 + 0.5 * (1 - passed))
    return 1.0
