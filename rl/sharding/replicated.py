"""Whole weights on every rank, gradients averaged: DistributedDataParallel, as accelerate sets it up."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from paceline.drafter_trainer.storage.optimizer_state import take_over_moments
from paceline.rl.sharding.base import AdamWSettings, Trained


class Replicated(Trained):
    """See `paceline.rl.sharding.base.Trained`.

    Args:
        module: To train.
        settings: Of its optimizer.
        accelerator: Of the run.
    """

    def __init__(self, module: nn.Module, settings: AdamWSettings, accelerator: Accelerator) -> None:
        self._accelerator, self._limit = accelerator, settings.grad_clip
        self.module, self._optimizer = accelerator.prepare(module, settings.over(module, fused=True))

    @property
    def bare(self) -> nn.Module:
        found: nn.Module = self._accelerator.unwrap_model(self.module)
        return found

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._accelerator.no_sync(self.module)

    def backward(self, loss: torch.Tensor) -> None:
        self._accelerator.backward(loss)

    def step(self) -> float:
        norm = float(self._accelerator.clip_grad_norm_(self.module.parameters(), self._limit))
        if math.isfinite(norm):
            self._optimizer.step()
        # Kept, not dropped: the gradients are views of DDP's buckets, and fresh ones beside those would be a
        #     second copy.
        self._optimizer.zero_grad(set_to_none=False)
        return norm

    def full_weights(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        for name, parameter in self.bare.named_parameters():
            if wanted(name):
                yield name, parameter.detach()

    def optimizer_state(self) -> dict[str, Any]:
        state: dict[str, Any] = self._optimizer.state_dict()
        return state

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        take_over_moments(self._optimizer, state)
