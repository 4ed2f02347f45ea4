"""What a recipe will take, before anything is loaded: memory of a rank, and the least time of a step on this machine."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from rl.config import LoraConfig, RunConfig
from rl.lora import add_adapters
from rl.policies import cached_policy
from rl.sharding import is_shared, trainable, zero_stage
from rl.shipped import shipped_folder
from rl.starting import starting_drafter
from rollout import default_tap_layers
from rollout.drafters.eagle3_model import eagle3_config, parameter_count
from rollout.kv_cache import CacheShape

_SHAPES = shipped_folder() / "shapes"
_TRAINED = 16  # bytes of a float32 parameter with its gradient and Adam's two moments


@dataclass(frozen=True, slots=True)
class Estimate:
    """Of one rank.

    Attributes:
        memory: Bytes by what takes them.
        rollout, update: Seconds of a step that cannot be undercut on this machine without speculation, if every completion takes
            half of ``rollout.max_tokens``.
        bandwidth, flops: Of this machine, as a rank has them: bytes and operations a second.
    """

    memory: dict[str, int]
    rollout: float
    update: float
    bandwidth: float
    flops: float


def policy_config(model: str) -> PreTrainedConfig | None:
    """The policy's configuration, without its weights: from where it lies, from configs/shapes, or from the hub; else None."""
    shape = _SHAPES / f"{model.replace('/', '--')}.json"
    path = cached_policy(model) or (shape if shape.is_file() else None)
    try:
        return AutoConfig.from_pretrained(model if path is None else path)
    except (OSError, ValueError):
        return None


def estimate(config: RunConfig, policy: PreTrainedConfig, ranks: int) -> Estimate:
    """A recipe on a policy.

    Args:
        config: The recipe.
        policy: From `policy_config`.
        ranks: That share the step's prompts, and what ``scale`` shards.
    """
    with torch.device("meta"):
        parameters = AutoModelForCausalLM.from_config(policy).num_parameters()
    memory = _memory(config, policy, parameters, ranks)
    bandwidth, flops = machine_speed(torch.bfloat16 if config.policy.mixed_precision == "bf16" else torch.float32)
    r = config.rollout
    sequences, length = r.prompts_per_step * r.group_size // ranks, r.max_tokens / 2
    width = getattr(torch, r.dtype).itemsize
    together = min(r.max_slots, sequences)
    decode = max(parameters * width / bandwidth, 2 * parameters * together / flops)
    passes = 8 if config.policy.gradient_checkpointing else 6  # forward 2, backward 4, and the forward again
    tokens = sequences * length + sequences / r.group_size * (r.max_context - r.max_tokens)
    return Estimate(memory, -(-sequences // together) * length * decode, passes * parameters * tokens / flops, bandwidth, flops)


def _training_bytes(config: RunConfig, parameters: int, trained: int, ranks: int) -> int:
    """Weights, gradients and Adam's moments of one rank: what a stage of ZeRO shards is divided by the ranks (table 1 of arXiv
    1910.02054, with float32 weights instead of 16-bit ones and copies of them)."""
    scale = config.scale
    stage = 3 if scale.fsdp2 else zero_stage(scale.deepspeed) if scale.deepspeed is not None else 0
    weights, gradients, moments = 4 * parameters, 4 * trained, 8 * trained
    sharded = [moments, gradients, weights][:stage]
    whole = [moments, gradients, weights][stage:]
    return sum(whole) + sum(-(-part // ranks) for part in sharded)


def _memory(config: RunConfig, policy: PreTrainedConfig, parameters: int, ranks: int) -> dict[str, int]:
    r, text = config.rollout, policy.get_text_config()
    heads = text.num_attention_heads
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    taps = default_tap_layers(text.num_hidden_layers) if "eagle3" in config.speculation.drafters else ()
    dtype = getattr(torch, r.dtype)
    width = text.hidden_size * (len(taps) + 1) if taps else 0
    shape = CacheShape(text.num_hidden_layers, kv_heads, head_dim, r.max_slots, r.max_context, width, dtype)
    cache = shape.token_bytes * r.max_slots * (r.max_context + config.speculation.max_nodes + 2)
    lora = config.scale.lora
    trained = parameters if lora is None else _adapter_parameters(policy, lora)
    copied = dtype != torch.float32 or not is_shared(config.scale)
    memory = {
        "policy, gradients and Adam": _training_bytes(config, parameters, trained, ranks),
        "the engine's copy of the policy": parameters * dtype.itemsize if copied else 0,
        "keys, values and taps": cache if r.kv_memory_gb is None else min(cache, int(r.kv_memory_gb * 1e9)),
        "activations of a micro-batch": _activations(config, policy),
    }
    if config.update.kl_coef > 0 and (lora is None or config.scale.sharded):
        memory["reference policy"] = 4 * parameters
    if config.update.advantage == "gae":
        memory["critic, gradients and Adam"] = _training_bytes(config, parameters, parameters, ranks)
    if taps:
        size = parameter_count(eagle3_config(policy, config.drafter.draft_vocab_size, taps))
        memory["drafters in training, served and approved"] = size * (_TRAINED * len(config.drafter.ensemble) + 8 + dtype.itemsize)
    return memory


def _adapter_parameters(policy: PreTrainedConfig, lora: LoraConfig) -> int:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(policy)
        add_adapters(model, lora, seed=0)
    return sum(p.numel() for p in trainable(model))


def _activations(config: RunConfig, policy: PreTrainedConfig) -> int:
    """34 bytes a token, layer and hidden unit in 16 bits (Korthikanti et al., arXiv 2205.05198, equation 1, without attention's
    scores, which are made anew); with checkpoints one layer's, and 2 of each other."""
    text = policy.get_text_config()
    size = 2 if config.policy.mixed_precision == "bf16" else 4
    layer = 17 * size * text.hidden_size
    layers = text.num_hidden_layers
    each = layer + layers * size * text.hidden_size if config.policy.gradient_checkpointing else layer * layers
    return config.update.tokens_per_microbatch * each


@cache
def machine_speed(dtype: torch.dtype) -> tuple[float, float]:
    """Bytes a second of reading, and operations a second of a product: the best of three."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    line = torch.ones(64 << 20, dtype=torch.float32, device=device)
    left = torch.ones(2048, 2048, dtype=dtype, device=device)

    def best(work: object) -> float:
        times = []
        for _ in range(3):
            begin = time.perf_counter()
            work()  # type: ignore[operator]
            if device == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - begin)
        return min(times)

    return line.nbytes / best(lambda: line.sum()), 2 * 2048**3 / best(lambda: left @ left)


def describe(config: RunConfig, path: Path, ranks: int) -> list[str]:
    """The estimate in lines of text; one that says why where there is none."""
    lines = [
        f"{path}: valid; {config.steps} steps of {config.rollout.prompts_per_step} prompts × {config.rollout.group_size} samples"
    ]
    if config.scale.deepspeed is not None:
        zero_stage(config.scale.deepspeed)  # whether the file can be used
    policy = policy_config(config.policy.model)
    if policy is None:
        return [*lines, f"{config.policy.model} is not at hand and the hub cannot be reached: nothing is estimated"]
    starting_drafter(config, policy)  # whether it can be used
    found = estimate(config, policy, ranks)
    width = max(len(name) for name in found.memory)
    lines += [f"  {name:<{width}}  {size / 1e9:7.2f} GB" for name, size in found.memory.items() if size]
    lines.append(f"  {'a rank':<{width}}  {sum(found.memory.values()) / 1e9:7.2f} GB")
    lines.append(
        f"a step, at the least (completions of {config.rollout.max_tokens // 2} tokens, {found.bandwidth / 1e9:.0f} GB/s, "
        f"{found.flops / 1e12:.2f} TFLOP/s here): rollouts {found.rollout:.1f} s without speculation, update {found.update:.1f} s"
    )
    return lines
