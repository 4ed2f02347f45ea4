"""The ``measure`` section: measurements beside the training."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class MeasureConfig:
    """Measurements beside the training, which cost time but do not change it."""

    plain_every: int = 0
    """RL steps between two steps whose requests are decoded again without speculation, for a paired speed
    ratio and a check that the tokens are the same; 0 never does."""
