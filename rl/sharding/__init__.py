"""Where the weights that are trained lie, with their gradients and the optimizer's state: whole on every
rank, or in parts.
"""

from __future__ import annotations

from accelerate import Accelerator
from torch import nn

from paceline.rl.config.scale import ScaleConfig
from paceline.rl.sharding.base import AdamWSettings, Trained, WholeState, trainable, whole_state
from paceline.rl.sharding.replicated import Replicated
from paceline.rl.sharding.settings import zero_stage

__all__ = [
    "AdamWSettings",
    "Trained",
    "WholeState",
    "is_shared",
    "shard",
    "trainable",
    "whole_state",
    "zero_stage",
]


def is_shared(scale: ScaleConfig) -> bool:
    """Whether each rank's own module holds the policy's whole weights, so that the engine can decode with
    them in place.
    """
    return not scale.sharded and scale.lora is None


def shard(
    module: nn.Module, scale: ScaleConfig, accelerator: Accelerator, settings: AdamWSettings
) -> Trained:
    """Wraps a module, and AdamW over its trainable parameters, as the recipe's scale section has it.
    Collective.

    Args:
        module: Equal on every rank, in float32; ZeRO 3 and FSDP2 take its parameters apart.
        scale: The recipe's.
        accelerator: Of the run.
        settings: Of the optimizer.

    Raises:
        UserError: when DeepSpeed is wanted and is not installed, its file cannot be used, or there is no
            process group.
    """
    if scale.deepspeed is not None:
        from paceline.rl.sharding.zero import ZeroSharded

        return ZeroSharded(module, settings, scale.deepspeed, accelerator)
    if scale.fsdp2:
        from paceline.rl.sharding.fsdp import FullySharded

        return FullySharded(module, settings, accelerator)
    return Replicated(module, settings, accelerator)
