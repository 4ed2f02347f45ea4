"""The tracking section: where metrics go besides ``metrics.jsonl``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class TrackingConfig:
    """Metrics always go to ``metrics.jsonl``; these add to it."""

    wandb: Literal["offline", "online", "disabled"] = "disabled"
    wandb_project: str = "paceline"
    tensorboard: bool = False
