"""The ``tracking`` section: where metrics go besides ``metrics.jsonl``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class TrackingConfig:
    """Experiment trackers beside ``metrics.jsonl``, which is always written."""

    wandb: Literal["offline", "online", "disabled"] = "disabled"
    """Mode of Weights & Biases: ``offline`` writes to the run's directory, ``online`` uploads."""

    wandb_project: str = "paceline"
    """Weights & Biases project."""

    tensorboard: bool = False
    """Write TensorBoard event files to the run's directory."""
