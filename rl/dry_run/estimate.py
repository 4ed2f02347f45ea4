"""Estimates a recipe's memory per rank and its time per step before any weights are loaded."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from paceline.rl.config.run import RunConfig
from paceline.rl.config.scale import LoraConfig
from paceline.rl.dry_run.devices import DeviceSpec
from paceline.rl.models.hub import HubUnreachable, hub_config
from paceline.rl.models.lora import add_adapters
from paceline.rl.models.policies import cached_policy
from paceline.rl.models.policy_files import read_config
from paceline.rl.process.shipped_files import shipped_folder
from paceline.rl.sharding import is_shared, trainable, zero_stage
from paceline.rollout import default_tap_layers
from paceline.rollout.drafters.eagle3_model import eagle3_config, parameter_count
from paceline.rollout.model.kv_cache import CacheShape
from paceline.rollout.model.shape import key_shape

_SHAPES = shipped_folder() / "shapes"
KEYS_AND_VALUES = "keys, values and taps"
_MOMENT_BYTES = 8  # per parameter: Adam keeps two float32 moments
_LIBRARY_BYTES = {
    "cuda": int(1e9),  # CUDA's context and workspaces
    "cpu": int(0.7e9),  # Python with torch and transformers imported
}
_VLLM_MEMORY_SHARE = 0.9  # vLLM's default of gpu_memory_utilization


@dataclass(frozen=True, slots=True)
class Part:
    """One consumer of memory.

    Attributes:
        what: Name of the consumer.
        size: Bytes on one rank.
        whole: Bytes before sharding among the ranks, or before the cut to the free memory; else ``size``.
    """

    what: str
    size: int
    whole: int


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
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(policy).num_parameters()
    parts = [*_training_parts(config, policy, parameters, ranks)]
    parts += _other_parts(config, policy, parameters, ranks)
    if config.rollout.vllm is not None and not config.rollout.vllm.servers:
        parts += _vllm_parts(config, parameters, device)
    parts.append(_unsharded("libraries", _LIBRARY_BYTES[device.device]))
    room = device.memory - sum(part.size for part in parts)
    shape = cache_shape(config, policy)
    full = shape.token_bytes * shape.slots * shape.capacity
    limit = config.rollout.kv_memory_gb
    size = max(min(full, room if limit is None else int(limit * 1e9)), shape.token_bytes * shape.capacity)
    parts.insert(-1, Part(KEYS_AND_VALUES, size, full))
    tokens = size // shape.token_bytes
    rollout, update = step_seconds(config, parameters, ranks, device, shape, tokens)
    return Estimate([part for part in parts if part.size], room, tokens, rollout, update)


def _equivalent_zero_stage(config: RunConfig) -> int:
    """Returns the ZeRO stage that a recipe shards by; FSDP2 shards what stage 3 does."""
    scale = config.scale
    return 3 if scale.fsdp2 else zero_stage(scale.deepspeed) if scale.deepspeed is not None else 0


def _model_states(
    prefix: str, config: RunConfig, parameters: int, trained: int, ranks: int, stage: int
) -> list[Part]:
    """Returns one rank's weights, gradients and Adam's moments, divided by the ranks where ZeRO shards them.

    This is table 1 of arXiv 1910.02054 with float32 weights instead of 16-bit weights and their float32
    copies. DeepSpeed keeps another copy of the weights, which its optimizer updates.

    Args:
        prefix: Beginning of the parts' names.
        config: The recipe.
        parameters: Number of the model's parameters.
        trained: Number of those that are trained.
        ranks: Number of ranks.
        stage: ZeRO stage.
    """
    sizes = {"Adam's moments": _MOMENT_BYTES * trained, "gradients": 4 * trained, "weights": 4 * parameters}
    sharded = list(sizes)[:stage]
    if config.scale.deepspeed is not None and stage:
        sizes["weights that DeepSpeed steps on"] = 4 * trained
        sharded.append("weights that DeepSpeed steps on")
    order = ("weights", "weights that DeepSpeed steps on", "gradients", "Adam's moments")
    return [
        Part(f"{prefix}{name}", -(-sizes[name] // ranks) if name in sharded else sizes[name], sizes[name])
        for name in order
        if name in sizes
    ]


def _training_parts(config: RunConfig, policy: PreTrainedConfig, parameters: int, ranks: int) -> list[Part]:
    """Returns the memory of the trained policy and critic."""
    lora, stage = config.scale.lora, _equivalent_zero_stage(config)
    trained = parameters if lora is None else _adapter_parameters(policy, lora)
    parts = _model_states("", config, parameters, trained, ranks, stage)
    if config.policy.mixed_precision == "bf16":
        cast = 2 * parameters if stage < 3 else 6 * _largest_layer(policy)
        name = "weights in bfloat16, for a forward" if stage < 3 else "a layer's weights, gathered"
        parts.append(_unsharded(name, cast))
    if config.update.advantage == "gae":
        parts += _model_states("critic: ", config, parameters, parameters, ranks, 0)
    return parts


def _other_parts(config: RunConfig, policy: PreTrainedConfig, parameters: int, ranks: int) -> list[Part]:
    """Returns the memory of the engine's weights, activations, the reference policy and the drafter."""
    dtype = getattr(torch, config.rollout.dtype)
    parts = []
    if dtype != torch.float32 or not is_shared(config.scale):
        parts.append(_unsharded("engine's copy of the weights", parameters * dtype.itemsize))
    parts.append(_unsharded("activations of a micro-batch", _activations(config, policy)))
    if config.update.kl_coef > 0 and (config.scale.lora is None or config.scale.sharded):
        parts.append(_unsharded("reference policy", 4 * parameters))
    if "eagle3" in config.speculation.drafters:
        text, drafter = policy.get_text_config(), config.drafter
        taps = default_tap_layers(text.num_hidden_layers)
        size = parameter_count(eagle3_config(policy, drafter.draft_vocab_size, taps))
        trained = 0 if drafter.schedule == "never" else size * (8 + _MOMENT_BYTES) * len(drafter.ensemble)
        parts.append(_unsharded("drafter in training", trained))
        parts.append(_unsharded("drafter, served and approved", size * (8 + dtype.itemsize)))
        if drafter.schedule != "never":
            tokens = min(
                drafter.memory_tokens,
                (drafter.previous_steps + 1) * int(_sequences(config, ranks) * _length(config)),
            )
            parts.append(
                _unsharded("drafter's traces", tokens * (len(taps) + 1) * text.hidden_size * dtype.itemsize)
            )
    return parts


def _unsharded(what: str, size: int) -> Part:
    return Part(what, size, size)


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
    return [_unsharded("vLLM's weights", weights), _unsharded("vLLM's keys and values", cache)]


def cache_shape(config: RunConfig, policy: PreTrainedConfig) -> CacheShape:
    """Returns the shape of the engine's cache if memory allows every slot its full length.

    The full length includes the draft tokens of a step.
    """
    r, text, keys = config.rollout, policy.get_text_config(), key_shape(policy)
    taps = default_tap_layers(text.num_hidden_layers) if "eagle3" in config.speculation.drafters else ()
    width = text.hidden_size * (len(taps) + 1) if taps else 0
    capacity = r.max_context + config.speculation.max_nodes + 2
    return CacheShape(
        keys.layers, keys.kv_heads, keys.head_dim, r.max_slots, capacity, width, getattr(torch, r.dtype)
    )


def _sequences(config: RunConfig, ranks: int) -> float:
    return config.rollout.prompts_per_step * config.rollout.group_size / ranks


def _length(config: RunConfig) -> float:
    """Returns the assumed tokens of a sequence: the longest prompt's and half the longest completion's."""
    return config.rollout.max_tokens / 2 + config.rollout.max_context - config.rollout.max_tokens


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
    sequences, length = _sequences(config, ranks), r.max_tokens / 2
    width = getattr(torch, r.dtype).itemsize
    batch = min(float(r.max_slots), sequences, max(tokens / _length(config), 1.0))
    keys = batch * _length(config) * 2 * shape.layers * shape.kv_heads * shape.head_dim * width
    decode = max((parameters * width + keys) / device.bandwidth, 2 * parameters * batch / device.flops)
    operations = 8 if config.policy.gradient_checkpointing else 6  # forward 2, backward 4, recomputation 2
    trained = sequences * length + sequences / r.group_size * (r.max_context - r.max_tokens)
    return sequences / batch * length * decode, operations * parameters * trained / device.flops


def _adapter_parameters(policy: PreTrainedConfig, lora: LoraConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(policy)
        add_adapters(model, lora, seed=0)
    return sum(p.numel() for p in trainable(model))


def _largest_layer(policy: PreTrainedConfig) -> int:
    """Returns the parameters of the largest module that a sharded forward gathers, layer or embedding."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(policy)
    embedding = model.get_input_embeddings().weight.numel()
    layers = policy.get_text_config().num_hidden_layers
    return max(embedding, (model.num_parameters() - embedding) // layers)


def _activations(config: RunConfig, policy: PreTrainedConfig) -> int:
    """Returns the bytes of a micro-batch's activations.

    In 16 bits this is 34 bytes per token, layer and hidden unit (Korthikanti et al., arXiv 2205.05198,
    equation 1, without the attention scores, which are recomputed). With activation checkpointing it is one
    layer's 34 bytes, and 2 bytes for each layer.
    """
    text = policy.get_text_config()
    width = 2 if config.policy.mixed_precision == "bf16" else 4
    layer = 17 * width * text.hidden_size
    layers = text.num_hidden_layers
    per_token = (
        layer + layers * width * text.hidden_size if config.policy.gradient_checkpointing else layer * layers
    )
    return config.update.tokens_per_microbatch * per_token
