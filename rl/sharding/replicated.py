"""Keeps full weights on every rank and averages gradients: DistributedDataParallel, set up by accelerate."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from paceline.drafter_trainer.storage.optimizer_state import take_over_moments
from paceline.rl.sharding.base import AdamWSettings, TrainedModule


class Replicated(TrainedModule):
    """A module under DistributedDataParallel; see `paceline.rl.sharding.base.TrainedModule`.

    Args:
        module: Module to train.
        settings: Settings of its optimizer.
        accelerator: The run's accelerator.
    """

    def __init__(self, module: nn.Module, settings: AdamWSettings, accelerator: Accelerator) -> None:
        self._accelerator, self._limit = accelerator, settings.grad_clip
        self.module, self._optimizer = accelerator.prepare(module, settings.over(module, fused=True))

    @property
    def unwrapped(self) -> nn.Module:
        """The module without DistributedDataParallel."""
        module: nn.Module = self._accelerator.unwrap_model(self.module)
        return module

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Returns a context manager that averages gradients over ranks in the last micro-batch only."""
        return nullcontext() if last else self._accelerator.no_sync(self.module)

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates a micro-batch's gradients."""
        self._accelerator.backward(loss)

    def step(self) -> float:
        """Clips and steps on the averaged gradients."""
        norm = float(self._accelerator.clip_grad_norm_(self.module.parameters(), self._limit))
        if math.isfinite(norm):
            self._optimizer.step()
        # Not set to None: gradients are views of DDP's buckets, and new ones would be a second copy.
        self._optimizer.zero_grad(set_to_none=False)
        return norm

    def full_weights(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the module's own parameters, which are already full."""
        for name, parameter in self.unwrapped.named_parameters():
            if wanted(name):
                yield name, parameter.detach()

    def optimizer_state(self) -> dict[str, Any]:
        """Returns the optimizer's own state dict, which is already full."""
        state: dict[str, Any] = self._optimizer.state_dict()
        return state

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Loads moments; the learning rate and other settings stay."""
        take_over_moments(self._optimizer, state)
