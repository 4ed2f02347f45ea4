"""The measure section: what is measured beside the run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MeasureConfig:
    """What is measured beside the run: every ``plain_every`` steps the same requests are decoded again
    without speculation, for a paired ratio; 0 never does.
    """

    plain_every: int = 0
