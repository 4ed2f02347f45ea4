"""What a recipe will take, before anything is loaded: memory of a rank by part, and the time of a step."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from paceline.rl.config.paths import shipped_folder
from paceline.rl.config.run import RunConfig
from paceline.rl.config.scale import LoraConfig
from paceline.rl.dry_run.devices import DeviceSpec
from paceline.rl.models.hub import HubUnreachable, hub_config
from paceline.rl.models.lora import add_adapters
from paceline.rl.models.policies import cached_policy
from paceline.rl.models.policy_files import read_config
from paceline.rl.sharding import is_shared, trainable, zero_stage
from paceline.rollout import default_tap_layers
from paceline.rollout.drafters.eagle3_model import eagle3_config, parameter_count
from paceline.rollout.model.kv_cache import CacheShape
from paceline.rollout.model.shape import key_shape

_SHAPES = shipped_folder() / "shapes"
KEYS_AND_VALUES = "keys, values and taps"
_MOMENTS = 8  # bytes of Adam's two for a parameter
_CONTEXT = {
    "cuda": int(1e9),
    "cpu": int(0.7e9),
}  # CUDA's context and workspaces; Python with torch and transformers imported
_VLLM_SHARE = 0.9  # of a GPU, that vLLM takes unless told otherwise (gpu_memory_utilization)


@dataclass(frozen=True, slots=True)
class Part:
    """Something that takes memory.

    Attributes:
        what: Its name.
        size: Bytes on one rank.
        whole: Bytes of all of it, where it is shared out among ranks or cut to what is free; else ``size``.
    """

    what: str
    size: int
    whole: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What one rank takes; all ranks take the same.

    Attributes:
        parts: What takes memory.
        room: Bytes left for keys and values by all other parts; may be negative.
        tokens: Tokens that the cache of keys and values holds.
        rollout, update: Seconds of a step without speculation if every completion takes half of
            ``rollout.max_tokens``; None where the device's speed is not known.
    """

    parts: list[Part]
    room: int
    tokens: int
    rollout: float | None
    update: float | None

    @property
    def total(self) -> int:
        """Bytes of all parts."""
        return sum(part.size for part in self.parts)

    def size(self, what: str) -> int:
        """Bytes of a part on a rank; 0 where there is none."""
        return sum(part.size for part in self.parts if part.what == what)


def policy_config(model: str) -> PreTrainedConfig | None:
    """The policy's configuration, without its weights: from where it lies, from configs/shapes, or from the
    hub.

    Returns:
        None where the hub is not reachable and nothing is at hand.

    Raises:
        UserError: when the hub does not hand it out, or it is not one of a causal language model.
    """
    shape = _SHAPES / f"{model.replace('/', '--')}.json"
    path = cached_policy(model) or (shape if shape.is_file() else None)
    try:
        path = hub_config(model) if path is None else path
    except HubUnreachable:
        return None
    return read_config(path)


def estimate(config: RunConfig, policy: PreTrainedConfig, ranks: int, place: DeviceSpec) -> Estimate:
    """Estimates what a recipe takes on a policy.

    Args:
        config: The recipe.
        policy: From `policy_config`.
        ranks: That share the step's prompts, and what ``scale`` shards.
        place: What each has.
    """
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(policy).num_parameters()
    parts = [*_trained(config, policy, parameters, ranks), *_beside(config, policy, parameters, ranks)]
    if config.rollout.vllm is not None and not config.rollout.vllm.servers:
        parts += _vllm(config, parameters, place)
    parts.append(Part("libraries", _CONTEXT[place.device], _CONTEXT[place.device]))
    room = place.memory - sum(part.size for part in parts)
    shape = cache_shape(config, policy)
    wanted = shape.token_bytes * shape.slots * shape.capacity
    limit = config.rollout.kv_memory_gb
    held = max(min(wanted, room if limit is None else int(limit * 1e9)), shape.token_bytes * shape.capacity)
    parts.insert(-1, Part(KEYS_AND_VALUES, held, wanted))
    tokens = held // shape.token_bytes
    rollout, update = step_seconds(config, parameters, ranks, place, shape, tokens)
    return Estimate([part for part in parts if part.size], room, tokens, rollout, update)


def _sharded(config: RunConfig) -> int:
    """The stage of ZeRO that a recipe shards by; FSDP2 shards what stage 3 does."""
    scale = config.scale
    return 3 if scale.fsdp2 else zero_stage(scale.deepspeed) if scale.deepspeed is not None else 0


def _in_training(
    what: str, config: RunConfig, parameters: int, trained: int, ranks: int, stage: int
) -> list[Part]:
    """Weights, gradients and Adam's moments of one rank: what a stage of ZeRO shards is divided by the ranks
    (table 1 of arXiv 1910.02054, with float32 weights instead of 16-bit ones and copies of them). DeepSpeed
    steps on its own copy of the weights.
    """
    sizes = {"Adam's moments": _MOMENTS * trained, "gradients": 4 * trained, "weights": 4 * parameters}
    sharded = list(sizes)[:stage]
    if config.scale.deepspeed is not None and stage:
        sizes["weights that DeepSpeed steps on"] = 4 * trained
        sharded.append("weights that DeepSpeed steps on")
    order = ("weights", "weights that DeepSpeed steps on", "gradients", "Adam's moments")
    return [
        Part(f"{what}{name}", -(-sizes[name] // ranks) if name in sharded else sizes[name], sizes[name])
        for name in order
        if name in sizes
    ]


def _trained(config: RunConfig, policy: PreTrainedConfig, parameters: int, ranks: int) -> list[Part]:
    lora, stage = config.scale.lora, _sharded(config)
    trained = parameters if lora is None else _adapter_parameters(policy, lora)
    parts = _in_training("", config, parameters, trained, ranks, stage)
    if config.policy.mixed_precision == "bf16":
        cast = 2 * parameters if stage < 3 else 6 * _largest_layer(policy)
        parts.append(
            _alike("weights in bfloat16, for a forward" if stage < 3 else "a layer's weights, gathered", cast)
        )
    if config.update.advantage == "gae":
        parts += _in_training("critic: ", config, parameters, parameters, ranks, 0)
    return parts


def _beside(config: RunConfig, policy: PreTrainedConfig, parameters: int, ranks: int) -> list[Part]:
    """The engine's weights, activations, the reference, the drafter."""
    dtype = getattr(torch, config.rollout.dtype)
    parts = []
    if dtype != torch.float32 or not is_shared(config.scale):
        parts.append(_alike("engine's copy of the weights", parameters * dtype.itemsize))
    parts.append(_alike("activations of a micro-batch", _activations(config, policy)))
    if config.update.kl_coef > 0 and (config.scale.lora is None or config.scale.sharded):
        parts.append(_alike("reference policy", 4 * parameters))
    if "eagle3" in config.speculation.drafters:
        text, drafter = policy.get_text_config(), config.drafter
        taps = default_tap_layers(text.num_hidden_layers)
        size = parameter_count(eagle3_config(policy, drafter.draft_vocab_size, taps))
        trained = 0 if drafter.schedule == "never" else size * (8 + _MOMENTS) * len(drafter.ensemble)
        parts.append(_alike("drafter in training", trained))
        parts.append(_alike("drafter, served and approved", size * (8 + dtype.itemsize)))
        if drafter.schedule != "never":
            kept = min(
                drafter.memory_tokens,
                (drafter.previous_steps + 1) * int(_sequences(config, ranks) * _length(config)),
            )
            parts.append(
                _alike("drafter's traces", kept * (len(taps) + 1) * text.hidden_size * dtype.itemsize)
            )
    return parts


def _alike(what: str, size: int) -> Part:
    return Part(what, size, size)


def _vllm(config: RunConfig, parameters: int, place: DeviceSpec) -> list[Part]:
    """vLLM in the process: its own weights, and what it keeps for keys and values beside the engine's."""
    options, r = (config.rollout.vllm.options if config.rollout.vllm is not None else {}), config.rollout
    weights = parameters * getattr(torch, r.dtype).itemsize
    if r.kv_memory_gb is not None:
        cache = int(r.kv_memory_gb * 1e9)
    elif place.device == "cpu":
        cache = int(float(os.environ.get("VLLM_CPU_KVCACHE_SPACE", "1")) * 2**30)
    else:
        cache = max(
            int(float(options.get("gpu_memory_utilization", _VLLM_SHARE)) * place.memory) - weights, 0
        )
    return [_alike("vLLM's weights", weights), _alike("vLLM's keys and values", cache)]


def cache_shape(config: RunConfig, policy: PreTrainedConfig) -> CacheShape:
    """What the engine's cache holds where memory allows: every slot at its longest, the drafts of a step
    included.
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
    """Tokens of prompt and completion that an estimate reckons with: half of the longest completion, and the
    longest prompt.
    """
    return config.rollout.max_tokens / 2 + config.rollout.max_context - config.rollout.max_tokens


def step_seconds(
    config: RunConfig, parameters: int, ranks: int, place: DeviceSpec, shape: CacheShape, tokens: int
) -> tuple[float | None, float | None]:
    """Seconds of a step's rollouts and of its update on one rank, without speculation.

    A decode step reads the weights once, and the keys and values of every sequence that it decodes, or
    computes 2 operations for each weight and sequence; an update computes 6 a weight and token, or 8 with
    recomputed activations.
    """
    if place.bandwidth is None or place.flops is None:
        return None, None
    r = config.rollout
    sequences, length = _sequences(config, ranks), r.max_tokens / 2
    width = getattr(torch, r.dtype).itemsize
    together = min(float(r.max_slots), sequences, max(tokens / _length(config), 1.0))
    keys = together * _length(config) * 2 * shape.layers * shape.kv_heads * shape.head_dim * width
    decode = max((parameters * width + keys) / place.bandwidth, 2 * parameters * together / place.flops)
    passes = 8 if config.policy.gradient_checkpointing else 6  # forward 2, backward 4, and the forward again
    trained = sequences * length + sequences / r.group_size * (r.max_context - r.max_tokens)
    return sequences / together * length * decode, passes * parameters * trained / place.flops


def _adapter_parameters(policy: PreTrainedConfig, lora: LoraConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(policy)
        add_adapters(model, lora, seed=0)
    return sum(p.numel() for p in trainable(model))


def _largest_layer(policy: PreTrainedConfig) -> int:
    """Parameters of the module that a sharded forward gathers at the most: a decoder layer or the
    embedding.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(policy)
    embedding = model.get_input_embeddings().weight.numel()
    layers = policy.get_text_config().num_hidden_layers
    return max(embedding, (model.num_parameters() - embedding) // layers)


def _activations(config: RunConfig, policy: PreTrainedConfig) -> int:
    """34 bytes a token, layer and hidden unit in 16 bits (Korthikanti et al., arXiv 2205.05198, equation 1,
    without attention's scores, which are made anew); with checkpoints one layer's, and 2 of each other.
    """
    text = policy.get_text_config()
    size = 2 if config.policy.mixed_precision == "bf16" else 4
    layer = 17 * size * text.hidden_size
    layers = text.num_hidden_layers
    each = (
        layer + layers * size * text.hidden_size if config.policy.gradient_checkpointing else layer * layers
    )
    return config.update.tokens_per_microbatch * each
