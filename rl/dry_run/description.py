"""Writes the lines that ``--dry-run`` prints: whether a recipe is valid, and the memory and time it needs."""

from __future__ import annotations

from pathlib import Path

import torch

from paceline.rl.config.run import RunConfig
from paceline.rl.dry_run.devices import DeviceSpec, published_gpu, this_machine
from paceline.rl.dry_run.estimate import KEYS_AND_VALUES, Estimate, estimate, policy_config
from paceline.rl.dry_run.tiny_policy import check_policy
from paceline.rl.memory.parts import cache_shape
from paceline.rl.models.initial import starting_drafter
from paceline.rl.sharding import zero_stage


def describe(config: RunConfig, path: Path, ranks: int, gpu: float | None = None) -> list[str]:
    """Describes the memory and time that a recipe needs.

    Args:
        config: The recipe.
        path: Path of the recipe.
        ranks: Number of ranks of the run; they share this machine if ``gpu`` is None.
        gpu: Memory of each rank's GPU in gigabytes; None for this machine's devices.

    Returns:
        Lines of text; if nothing can be estimated, a line says why.

    Raises:
        UserError: If the policy, the drafter or the DeepSpeed config cannot be used.
    """
    r = config.rollout
    on_ranks = f" on {ranks} ranks" if ranks > 1 else ""
    lines = [
        f"{path}: valid; {config.steps} steps of {r.prompts_per_step} prompts × {r.group_size} "
        f"samples{on_ranks}"
    ]
    if r.prompts_per_step % ranks:
        lines.append(
            f"rollout.prompts_per_step is {r.prompts_per_step}, not a multiple of {ranks} ranks: the run "
            "will not start; write a multiple"
        )
    if config.scale.deepspeed is not None:
        zero_stage(config.scale.deepspeed)  # raises if the file is unusable
    policy = policy_config(config.policy.model)
    if policy is None:
        return [
            *lines,
            f"{config.policy.model} is not on this machine, and the hub is unreachable: nothing is estimated",
        ]
    untried = check_policy(policy, r.max_context)
    if untried is not None:
        lines.append(f"{untried}: the run itself will check it")
    starting_drafter(config, policy)  # raises if the drafter is unusable
    dtype = torch.bfloat16 if config.policy.mixed_precision == "bf16" else torch.float32
    device = this_machine(ranks, policy, dtype) if gpu is None else published_gpu(gpu)
    needs = estimate(config, policy, ranks, device)
    cache = cache_shape(config, policy)
    return [
        *lines,
        *_memory(needs, device, ranks, cache.slots, cache.capacity),
        *_advice(config, needs, device),
        *_time(config, needs, device),
    ]


def size(amount: float) -> str:
    """Formats bytes in the largest of kB, MB and GB that does not round them to zero."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if amount >= factor / 10:
            return f"{amount / factor:.2f} {unit}" if unit == "GB" else f"{amount / factor:.1f} {unit}"
    return f"{amount / 1e3:.1f} kB"


def _memory(needs: Estimate, device: DeviceSpec, ranks: int, slots: int, capacity: int) -> list[str]:
    each = "the rank" if ranks == 1 else f"each of the {ranks} ranks"
    lines = [f"memory of {each}, of {size(device.memory)} ({device.name}):"]
    width = max(len(part.what) for part in needs.parts)
    for part in needs.parts:
        note = ""
        if part.what == KEYS_AND_VALUES:
            note = f"  {slots} sequences of {capacity} tokens"
            if part.size < part.whole:
                note = (
                    f"  of {size(part.whole)} for{note[1:]}: {needs.tokens // capacity} of full length at a "
                    f"time"
                )
        elif part.size < part.whole:
            note = f"  1/{ranks} of {size(part.whole)}"
        lines.append(f"  {part.what:<{width}}  {size(part.size):>10}{note}")
    return [*lines, f"  {'total':<{width}}  {size(needs.total):>10}"]


def _advice(config: RunConfig, needs: Estimate, device: DeviceSpec) -> list[str]:
    excess = needs.total - device.memory
    if excess > 0:
        return [
            f"does not fit, by {size(excess)}: shard over more ranks (scale.fsdp2=true), or lower "
            "update.tokens_per_microbatch or rollout.max_context"
        ]
    keys = next(part for part in needs.parts if part.what == KEYS_AND_VALUES)
    if device.device == "cpu" and keys.size < keys.whole and config.rollout.kv_memory_gb is None:
        return [
            f"write rollout.kv_memory_gb={_rounded_down(keys.size) / 1e9:g}: without it the engine takes all "
            "memory that is free when it starts, before the first update has allocated gradients and moments"
        ]
    return []


def _rounded_down(size: int) -> int:
    """Returns the largest number of three digits and zeros that is no larger."""
    step = 10 ** max(len(str(size)) - 3, 0)
    return size // step * step


def _time(config: RunConfig, needs: Estimate, device: DeviceSpec) -> list[str]:
    if needs.rollout is None or needs.update is None or device.bandwidth is None or device.flops is None:
        return [
            f"no time is estimated: the speed of {device.name} is not known; GPU sizes with known speeds: "
            "24, 40, 48, 80, 141, 192"
        ]
    return [
        f"100 steps without speculation: about {_seconds(100 * (needs.rollout + needs.update))}; "
        f"a step: rollouts {_seconds(needs.rollout)}, update {_seconds(needs.update)}",
        f"  estimated for completions of {config.rollout.max_tokens // 2} tokens (half of "
        f"rollout.max_tokens), {device.bandwidth / 1e9:.3g} GB/s and {device.flops / 1e12:.2g} TFLOP/s of "
        f"{device.name} ({device.speed_from})",
    ]


def _seconds(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
