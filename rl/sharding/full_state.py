"""The full state of a trained module, gathered for a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from paceline.rl.sharding.base import TrainedModule


@dataclass(frozen=True, slots=True)
class FullState:
    """What a checkpoint stores of a trained module.

    Attributes:
        weights: Full weights by name.
        optimizer: The optimizer's state dict.
    """

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]


def gather_full_state(
    weights: Iterator[tuple[str, torch.Tensor]], trained: TrainedModule, main: bool
) -> FullState:
    """Gathers full weights and the optimizer's state. Collective.

    Args:
        weights: Iterator from `TrainedModule.full_weights` of ``trained``.
        trained: Module whose optimizer's state is gathered.
        main: Whether this rank keeps the weights; other ranks get none.
    """
    return FullState({name: tensor.cpu() for name, tensor in weights if main}, trained.optimizer_state())
