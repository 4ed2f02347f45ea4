"""Placement of the trained weights, their gradients and the optimizer's state.

Each rank holds a full copy (DDP) or a partition (DeepSpeed's ZeRO, FSDP2).
"""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn

from paceline.rl.config.scale import ScaleConfig
from paceline.rl.sharding.base import AdamWSettings, TrainedModule, trainable
from paceline.rl.sharding.full_state import FullState, gather_full_state
from paceline.rl.sharding.replicated import Replicated
from paceline.rl.sharding.settings import zero_stage

__all__ = [
    "AdamWSettings",
    "FullState",
    "TrainedModule",
    "gather_full_state",
    "is_shared",
    "shard",
    "trainable",
    "zero_stage",
]


def is_shared(scale: ScaleConfig) -> bool:
    """Returns whether each rank's module holds full weights that the engine can decode with in place."""
    return not scale.sharded and scale.lora is None


def shard(
    module: nn.Module, scale: ScaleConfig, accelerator: Accelerator, settings: AdamWSettings
) -> TrainedModule:
    """Wraps a module, and AdamW over its trainable parameters, as the scale section says. Collective.

    Args:
        module: float32 module, equal on every rank; ZeRO 3 and FSDP2 partition its parameters.
        scale: The recipe's scale section.
        accelerator: The run's accelerator.
        settings: Settings of the optimizer.

    Raises:
        UserError: DeepSpeed is requested but not installed, its settings file cannot be used, or there is no
            process group.
    """
    if scale.deepspeed is not None:
        from paceline.rl.sharding.zero import ZeroSharded

        return ZeroSharded(module, settings, scale.deepspeed, accelerator)
    if scale.fsdp2:
        from paceline.rl.sharding.fsdp import FullySharded

        return FullySharded(module, settings, accelerator)
    return Replicated(module, settings, accelerator)
