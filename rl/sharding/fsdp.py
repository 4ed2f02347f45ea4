"""Partitions weights, gradients and moments by PyTorch's FSDP2 (``fully_shard``)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from paceline.rl.errors import UserError
from paceline.rl.sharding.base import AdamWSettings, TrainedModule, trainable
from paceline.rl.sharding.gathering import full_parameters, full_tensor
from paceline.rl.sharding.optimizer_state import as_state, checked_moments


class FullySharded(TrainedModule):
    """A module under FSDP2; see `paceline.rl.sharding.base.TrainedModule`.

    A layer's weights are gathered while it computes, and gradients are scattered with every micro-batch.

    Args:
        module: Module to train; its decoder layers are the entries of its `nn.ModuleList`s.
        settings: Settings of its optimizer. With ``bf16``, weights are gathered and used in bfloat16; weights
            are stored, and gradients summed, in float32.
        accelerator: The run's accelerator.

    Raises:
        UserError: There is no process group.
    """

    in_lockstep = True

    def __init__(self, module: nn.Module, settings: AdamWSettings, accelerator: Accelerator) -> None:
        if not torch.distributed.is_initialized():
            raise UserError(
                "scale.fsdp2 needs a process group: start with torchrun --nproc_per_node N "
                "launch/train.py RECIPE"
            )
        mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
        policy = MixedPrecisionPolicy(
            param_dtype=torch.bfloat16 if settings.precision == "bf16" else None, reduce_dtype=torch.float32
        )
        layers = [layer for part in module.modules() if isinstance(part, nn.ModuleList) for layer in part]
        for layer in layers:
            fully_shard(layer, mesh=mesh, mp_policy=policy)
        self.module = module
        fully_shard(module, mesh=mesh, mp_policy=policy)
        self._parameters = trainable(self.module)
        self._optimizer, self._limit = settings.over(self.module), settings.grad_clip
        self._main = accelerator.is_main_process

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates a micro-batch's gradients, scattered over the ranks."""
        loss.backward()

    def step(self) -> float:
        """Clips and steps on this rank's partition."""
        norm = float(full_tensor(torch.nn.utils.clip_grad_norm_(self._parameters, self._limit)))
        if math.isfinite(norm):
            self._optimizer.step()
        self._optimizer.zero_grad()
        return norm

    def full_weights(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the full weights, one gathered parameter at a time."""
        return full_parameters(self.module, wanted)

    def optimizer_state(self) -> dict[str, Any]:
        """Gathers the full moments; only the main rank keeps them."""
        entries = []
        for p in self._parameters:
            moments = {name: full_tensor(value) for name, value in self._optimizer.state.get(p, {}).items()}
            entries.append({name: moment.cpu() for name, moment in moments.items()} if self._main else {})
        return as_state(entries, self._optimizer.param_groups[0])

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Distributes full moments over the ranks."""
        entries = checked_moments(state, self._parameters, [p.shape for p in self._parameters])
        for p, entry in zip(self._parameters, entries, strict=True):
            assert isinstance(p, DTensor)
            self._optimizer.state[p] = {
                name: value
                if value.dim() == 0
                else distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
                for name, value in entry.items()
            }
