"""Learning rates over a run whose number of steps is known."""

from __future__ import annotations

import math
from typing import Literal

Schedule = Literal["constant", "linear", "cosine", "rex"]


def rate_at(step: int, steps: int, warmup: int, schedule: Schedule) -> float:
    """Share of the learning rate that holds in a step: a linear rise, then the schedule over what is left.

    ``rex`` is (1 − z) / (1/2 + (1 − z) / 2) at the share z of the steps (Chen et al., "REX: Revisiting
    Budgeted Training with an Improved Schedule", arXiv 2107.04197): higher than linear for most of the way,
    falling fast at the end.

    Args:
        step: From 0.
        steps: Of the run.
        warmup: Steps of the rise; the first has 1 / warmup of the rate.
        schedule: ``constant`` stays at 1.
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
