"""Partitions weights, gradients and moments by DeepSpeed's ZeRO (Rajbhandari et al., arXiv 1910.02054)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn

from paceline.rl.errors import UserError
from paceline.rl.sharding.base import AdamWSettings, TrainedModule, trainable
from paceline.rl.sharding.gathering import full_parameters
from paceline.rl.sharding.optimizer_state import as_state, checked_moments
from paceline.rl.sharding.settings import read_settings, stage_of

_MOMENTS = ("exp_avg", "exp_avg_sq")


class ZeroSharded(TrainedModule):
    """A module under DeepSpeed, stages 0 to 3; see `paceline.rl.sharding.base.TrainedModule`.

    DeepSpeed accumulates gradients without counting micro-batches (``managed_gradient_accumulation: false``);
    `step` ends an optimizer step. Parameters stay float32 and the arithmetic is the run's autocast, so that a
    checkpoint holds exactly what was trained.

    Args:
        module: Module to train.
        settings: Settings of its optimizer.
        path: Path of DeepSpeed's JSON file.
        accelerator: The run's accelerator.

    Raises:
        UserError: The file cannot be used (see `read_settings`), DeepSpeed is not installed, or there is no
            process group.
    """

    def __init__(
        self, module: nn.Module, settings: AdamWSettings, path: str, accelerator: Accelerator
    ) -> None:
        user_settings = read_settings(path)
        try:
            import deepspeed
        except ImportError:
            raise UserError("scale.deepspeed needs DeepSpeed: pip install 'paceline[deepspeed]'") from None
        if not torch.distributed.is_initialized():
            raise UserError(
                "scale.deepspeed needs a process group: start with torchrun --nproc_per_node N "
                "launch/train.py RECIPE"
            )
        self._stage, self._limit, self._main = (
            stage_of(user_settings),
            settings.grad_clip,
            accelerator.is_main_process,
        )
        # DeepSpeed calls functions that torch has renamed, and torch warns at every call
        warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
        self.in_lockstep = self._stage >= 2  # from stage 2 on, every backward pass scatters gradients
        fixed_settings = {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "zero_force_ds_cpu_optimizer": False,
            "gradient_clipping": settings.grad_clip,
            "steps_per_print": 10**9,
        }
        self._parameters = trainable(module)
        self._torch = settings.over(module)
        self._engine, self._optimizer, *_ = deepspeed.initialize(
            model=module, optimizer=self._torch, config={**user_settings, **fixed_settings}
        )
        self.module = self._engine

    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates a micro-batch's gradients in DeepSpeed's engine."""
        self._engine.backward(loss)

    def step(self) -> float:
        """Clips and steps through DeepSpeed's engine."""
        if self._stage > 0:
            self._engine.step()
            return float(self._engine.get_global_grad_norm()) if self._engine.was_step_applied() else math.nan
        # At stage 0, the engine's step would not skip non-finite gradients, so its parts are called here.
        self._engine.buffered_allreduce_fallback()
        norm = float(torch.nn.utils.clip_grad_norm_(self._parameters, self._limit))
        if math.isfinite(norm):
            self._torch.step()
        self._engine.zero_grad()
        return norm

    def full_weights(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the full weights, one gathered parameter at a time."""
        return full_parameters(self._engine.module, wanted)

    def optimizer_state(self) -> dict[str, Any]:
        """Gathers the full moments; only the main rank keeps them."""
        group = self._optimizer.param_groups[0]
        if self._stage == 0:
            state: dict[str, Any] = self._torch.state_dict()
            return state
        partitions = [part for part in self._torch.state.values() if part]
        if not partitions:  # no step yet
            return as_state([{} for _ in self._parameters], group)
        from deepspeed.utils import safe_get_full_optimizer_state

        step = torch.as_tensor(partitions[0]["step"]).cpu().float()
        entries = []
        for p in self._parameters:
            moments = {name: safe_get_full_optimizer_state(p, name) for name in _MOMENTS}
            entries.append(
                {"step": step.clone(), **{n: m.cpu() for n, m in moments.items()}} if self._main else {}
            )
        return as_state(entries, group)

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Distributes full moments over the ranks."""
        if self._stage == 0:
            self._torch.load_state_dict(state)
            return
        from deepspeed.utils import safe_set_full_optimizer_state

        shapes = [getattr(p, "ds_shape", p.shape) for p in self._parameters]
        entries = checked_moments(state, self._parameters, shapes)
        if not all(entries):
            return
        self._make_moments(float(entries[0]["step"]))
        for p, entry in zip(self._parameters, entries, strict=True):
            for name in _MOMENTS:
                safe_set_full_optimizer_state(p, entry[name], name)

    def _make_moments(self, step: float) -> None:
        """Creates moments of zero for this rank's partitions.

        DeepSpeed would create them only in its first step.
        """
        flat: Any = self._optimizer
        for part in (
            flat.fp32_partitioned_groups_flat if self._stage == 3 else flat.single_partition_of_fp32_groups
        ):
            zeros = {name: torch.zeros_like(part.data) for name in _MOMENTS}
            self._torch.state[part] = {"step": torch.tensor(step), **zeros}
        if self._stage < 3:
            flat._lazy_init_hp_params_optimizer_state()
