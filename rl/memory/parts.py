"""What the training of a recipe takes of a rank's memory, by part."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig

from paceline.rl.config.run import RunConfig
from paceline.rl.config.scale import LoraConfig
from paceline.rl.memory.activations import drafter_activations, update_activations
from paceline.rl.models.lora import add_adapters
from paceline.rl.sharding import is_shared, trainable, zero_stage
from paceline.rollout import default_tap_layers
from paceline.rollout.drafters import EAGLE3_DRAFTERS
from paceline.rollout.drafters.draft_graphs import drafter_graph_bytes
from paceline.rollout.drafters.eagle3_model import SINKS, attention_shape, eagle3_config, parameter_count
from paceline.rollout.drafters.eagle3_native import draft_shape
from paceline.rollout.graphs.graph_plan import ModelShape
from paceline.rollout.model.kv_cache import CacheShape
from paceline.rollout.model.shape import key_shape
from paceline.rollout.strategy import Strategy, default_arms
from paceline.rollout.trees import MAX_NODES

ENGINE_COPY = "engine's copy of the weights"
WEIGHTS = "weights"
_MOMENT_BYTES = 8  # per parameter: Adam keeps two float32 moments


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
    sizes = {"Adam's moments": _MOMENT_BYTES * trained, "gradients": 4 * trained, WEIGHTS: 4 * parameters}
    sharded = list(sizes)[:stage]
    if config.scale.deepspeed is not None and stage:
        sizes["weights that DeepSpeed steps on"] = 4 * trained
        sharded.append("weights that DeepSpeed steps on")
    order = (WEIGHTS, "weights that DeepSpeed steps on", "gradients", "Adam's moments")
    return [
        Part(f"{prefix}{name}", -(-sizes[name] // ranks) if name in sharded else sizes[name], sizes[name])
        for name in order
        if name in sizes
    ]


def training_parts(config: RunConfig, policy: PreTrainedConfig, parameters: int, ranks: int) -> list[Part]:
    """Returns the memory of the trained policy and critic; its arguments are those of `other_parts`."""
    lora, stage = config.scale.lora, _equivalent_zero_stage(config)
    trained = parameters if lora is None else _adapter_parameters(policy, lora)
    parts = _model_states("", config, parameters, trained, ranks, stage)
    if config.policy.mixed_precision == "bf16":
        cast = 2 * parameters if stage < 3 else 6 * _largest_layer(policy)
        name = "weights in bfloat16, for a forward" if stage < 3 else "a layer's weights, gathered"
        parts.append(unsharded(name, cast))
    if config.update.advantage == "gae":
        parts += _model_states("critic: ", config, parameters, parameters, ranks, 0)
    return parts


def other_parts(config: RunConfig, policy: PreTrainedConfig, parameters: int, ranks: int) -> list[Part]:
    """Returns the memory of the engine's weights, activations, the reference policy and the drafter.

    Args:
        config: The recipe.
        policy: The policy's configuration.
        parameters: Number of its parameters.
        ranks: Number of ranks.
    """
    dtype = getattr(torch, config.rollout.dtype)
    parts = []
    if dtype != torch.float32 or not is_shared(config.scale):
        parts.append(unsharded(ENGINE_COPY, parameters * dtype.itemsize))
    parts.append(unsharded("activations of a micro-batch", update_activations(config, policy)))
    if config.update.kl_coef > 0 and (config.scale.lora is None or config.scale.sharded):
        parts.append(unsharded("reference policy", 4 * parameters))
    if "eagle3" in config.speculation.drafters:
        parts += _drafter_parts(config, policy, ranks)
    return parts


def _drafter_parts(config: RunConfig, policy: PreTrainedConfig, ranks: int) -> list[Part]:
    """Returns the memory of the EAGLE-3 drafter, served and in training."""
    text, drafter, dtype = policy.get_text_config(), config.drafter, getattr(torch, config.rollout.dtype)
    taps = default_tap_layers(text.num_hidden_layers)
    shape = eagle3_config(policy, drafter.draft_vocab_size, taps, drafter.parallel_positions > 0)
    size = parameter_count(shape)
    _, kv_heads, head_dim = attention_shape(shape)
    slot, window = cache_shape(config, policy).capacity, config.speculation.eagle3_window
    places = (slot if window is None else min(2 * window + SINKS, slot)) + MAX_NODES
    cache = CacheShape(1, kv_heads, head_dim, config.rollout.max_slots, places, 0, dtype)
    parts = [
        unsharded("drafter, served and approved", size * (8 + dtype.itemsize)),
        unsharded("drafter's keys and values", cache.slots * cache.capacity * cache.token_bytes),
        unsharded("drafter's captured graphs", _draft_graphs(config, draft_shape(shape, dtype))),
    ]
    if drafter.schedule == "never":
        return parts
    tokens = min(
        drafter.memory_tokens,
        (drafter.previous_steps + 1) * int(step_sequences(config, ranks) * assumed_length(config)),
    )
    # an update and the drafter's training never run at once on a rank
    beyond = max(drafter_activations(config, shape) - update_activations(config, policy), 0)
    return [
        *parts,
        unsharded("drafter in training", size * (8 + _MOMENT_BYTES) * len(drafter.ensemble)),
        unsharded("drafter's activations, beyond an update's", beyond),
        unsharded("drafter's traces", tokens * (len(taps) + 1) * text.hidden_size * dtype.itemsize),
    ]


def _draft_graphs(config: RunConfig, sizes: ModelShape) -> int:
    """Returns the bytes of the drafter's captured graphs, for the strategies that the recipe may choose."""
    speculation, slots = config.speculation, config.rollout.max_slots
    names = speculation.arms or (() if speculation.strategy == "adaptive" else (speculation.strategy,))
    families = [name for name in ("eagle3", "parallel") if name in speculation.drafters]
    arms = [Strategy.parse(name) for name in names] or [
        arm for name in families for arm in default_arms(name, speculation.max_nodes)
    ]
    drafts = (arm for arm in arms if arm.drafter in EAGLE3_DRAFTERS)
    return drafter_graph_bytes(sizes, drafts, slots, config.drafter.parallel_positions > 0)


def unsharded(what: str, size: int) -> Part:
    """Returns a part that each rank holds whole."""
    return Part(what, size, size)


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


def step_sequences(config: RunConfig, ranks: int) -> float:
    """Returns the sequences of a step on one rank."""
    return config.rollout.prompts_per_step * config.rollout.group_size / ranks


def assumed_length(config: RunConfig) -> float:
    """Returns the assumed tokens of a sequence: the longest prompt's and half the longest completion's."""
    return config.rollout.max_tokens / 2 + config.rollout.max_context - config.rollout.max_tokens


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
