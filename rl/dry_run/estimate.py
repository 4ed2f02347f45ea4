"""Estimates a recipe's memory per rank and its time per step before any weights are loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from transformers import PreTrainedConfig

from paceline.rl.config.run import RunConfig
from paceline.rl.dry_run.devices import DeviceSpec
from paceline.rl.memory.gpu import PREFILL_TOKENS, parameter_number
from paceline.rl.memory.parts import (
    Part,
    assumed_length,
    cache_shape,
    other_parts,
    step_sequences,
    training_parts,
    unsharded,
)
from paceline.rl.models.hub import HubUnreachable, hub_config
from paceline.rl.models.policies import cached_policy
from paceline.rl.models.policy_files import read_config
from paceline.rl.process.shipped_files import shipped_folder
from paceline.rollout.model.kv_cache import CacheShape
from paceline.rollout.model.memory_plan import forward_parts, model_shape, spare_bytes

_SHAPES = shipped_folder() / "shapes"
KEYS_AND_VALUES = "keys, values and taps"
_LIBRARY_BYTES = {
    "cuda": int(1e9),  # CUDA's context and workspaces
    "cpu": int(0.7e9),  # Python with torch and transformers imported
}
_VLLM_MEMORY_SHARE = 0.9  # vLLM's default of gpu_memory_utilization


@dataclass(frozen=True, slots=True)
class Estimate:
    """Memory and time that one rank needs; they are the same on all ranks.

    Attributes:
        parts: Consumers of memory.
        room: Bytes that all other parts leave for keys and values; it may be negative.
        tokens: Number of tokens that the cache of keys and values holds.
        rollout: Seconds of a step's rollouts without speculation, if completions have half of
            ``rollout.max_tokens``; None if the device's speed is not known.
        update: Seconds of a step's update under that assumption; None if the device's speed is not known.
    """

    parts: list[Part]
    room: int
    tokens: int
    rollout: float | None
    update: float | None

    @property
    def total(self) -> int:
        """The bytes of all parts on a rank."""
        return sum(part.size for part in self.parts)

    def size(self, what: str) -> int:
        """Returns the bytes of a part on a rank; 0 if there is no such part."""
        return sum(part.size for part in self.parts if part.what == what)


def policy_config(model: str) -> PreTrainedConfig | None:
    """Reads a policy's configuration without its weights: from its directory, from configs/shapes or the hub.

    Args:
        model: Value of ``policy.model``.

    Returns:
        The configuration; None if it is not on this machine and the hub is not reachable.

    Raises:
        UserError: If the hub denies access, or the configuration is not that of a causal language model.
    """
    shape = _SHAPES / f"{model.replace('/', '--')}.json"
    path = cached_policy(model) or (shape if shape.is_file() else None)
    try:
        path = hub_config(model) if path is None else path
    except HubUnreachable:
        return None
    return read_config(path)


def estimate(config: RunConfig, policy: PreTrainedConfig, ranks: int, device: DeviceSpec) -> Estimate:
    """Estimates the memory and time that a recipe needs with a policy.

    Args:
        config: The recipe.
        policy: Configuration from `policy_config`.
        ranks: Number of ranks, which share the step's prompts and what ``scale`` shards.
        device: Device of each rank.
    """
    parameters, shape = parameter_number(policy), cache_shape(config, policy)
    parts = [*training_parts(config, policy, parameters, ranks)]
    parts += other_parts(config, policy, parameters, ranks)
    if config.rollout.vllm is not None and not config.rollout.vllm.servers:
        parts += _vllm_parts(config, parameters, device)
    if device.device == "cuda":  # as the engine plans
        own = forward_parts(model_shape(policy, shape), shape.slots, PREFILL_TOKENS)
        parts += [unsharded(what, size) for what, size in own.items()]
        parts.append(unsharded("spare", spare_bytes(device.memory)))
    parts.append(unsharded("libraries", _LIBRARY_BYTES[device.device]))
    room = device.memory - sum(part.size for part in parts)
    full = shape.token_bytes * shape.slots * shape.capacity
    limit = config.rollout.kv_memory_gb
    size = max(min(full, room if limit is None else int(limit * 1e9)), shape.token_bytes * shape.capacity)
    parts.insert(-1, Part(KEYS_AND_VALUES, size, full))
    tokens = size // shape.token_bytes
    rollout, update = step_seconds(config, parameters, ranks, device, shape, tokens)
    return Estimate([part for part in parts if part.size], room, tokens, rollout, update)


def _vllm_parts(config: RunConfig, parameters: int, device: DeviceSpec) -> list[Part]:
    """Returns the memory of vLLM in the process: its weights and its own cache of keys and values."""
    options, r = (config.rollout.vllm.options if config.rollout.vllm is not None else {}), config.rollout
    weights = parameters * getattr(torch, r.dtype).itemsize
    if r.kv_memory_gb is not None:
        cache = int(r.kv_memory_gb * 1e9)
    elif device.device == "cpu":
        cache = int(float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")) * 2**30)
    else:
        share = float(options.get("gpu_memory_utilization", _VLLM_MEMORY_SHARE))
        cache = max(int(share * device.memory) - weights, 0)
    return [unsharded("vLLM's weights", weights), unsharded("vLLM's keys and values", cache)]


def step_seconds(
    config: RunConfig, parameters: int, ranks: int, device: DeviceSpec, shape: CacheShape, tokens: int
) -> tuple[float | None, float | None]:
    """Estimates the time of a step on one rank without speculation.

    A decode step takes the longer of two times: reading the weights once and the keys and values of each
    decoded sequence, or computing 2 operations per weight and sequence. An update computes 6 operations per
    weight and token, or 8 if activations are recomputed.

    Args:
        config: The recipe.
        parameters: Number of the policy's parameters.
        ranks: Number of ranks.
        device: Device of each rank.
        shape: Shape of the engine's cache.
        tokens: Number of tokens that the cache holds.

    Returns:
        Seconds of the rollouts and of the update; None if the device's speed is not known.
    """
    if device.bandwidth is None or device.flops is None:
        return None, None
    r = config.rollout
    sequences, length = step_sequences(config, ranks), r.max_tokens / 2
    width = getattr(torch, r.dtype).itemsize
    batch = min(float(r.max_slots), sequences, max(tokens / assumed_length(config), 1.0))
    keys = batch * assumed_length(config) * 2 * shape.layers * shape.kv_heads * shape.head_dim * width
    decode = max((parameters * width + keys) / device.bandwidth, 2 * parameters * batch / device.flops)
    operations = 8 if config.policy.gradient_checkpointing else 6  # forward 2, backward 4, recomputation 2
    trained = sequences * length + sequences / r.group_size * (r.max_context - r.max_tokens)
    return sequences / batch * length * decode, operations * parameters * trained / device.flops
