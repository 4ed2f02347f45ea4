"""What ``--dry-run`` prints: whether a recipe is valid, and what it will take."""

from __future__ import annotations

from pathlib import Path

import torch

from paceline.rl.config.run import RunConfig
from paceline.rl.dry_run.devices import DeviceSpec, published_gpu, this_machine
from paceline.rl.dry_run.estimate import KEYS_AND_VALUES, Estimate, cache_shape, estimate, policy_config
from paceline.rl.dry_run.tiny_policy import check_policy
from paceline.rl.models.initial import starting_drafter
from paceline.rl.sharding import zero_stage


def describe(config: RunConfig, path: Path, ranks: int, gpu: float | None = None) -> list[str]:
    """Describes what a recipe will take, in lines of text; where nothing can be estimated, a line says why.

    Args:
        config: The recipe.
        path: Where it is from.
        ranks: Of the run; they share this machine where no ``gpu`` is named.
        gpu: Gigabytes of each rank's GPU; None for this machine's devices.
    """
    r = config.rollout
    of = f" on {ranks} ranks" if ranks > 1 else ""
    lines = [
        f"{path}: valid; {config.steps} steps of {r.prompts_per_step} prompts × {r.group_size} samples{of}"
    ]
    if r.prompts_per_step % ranks:
        lines.append(
            f"rollout.prompts_per_step is {r.prompts_per_step}, not a multiple of {ranks} ranks: it will not "
            "run so"
        )
    if config.scale.deepspeed is not None:
        zero_stage(config.scale.deepspeed)  # whether the file can be used
    policy = policy_config(config.policy.model)
    if policy is None:
        return [
            *lines,
            f"{config.policy.model} is not at hand and the hub cannot be reached: nothing is estimated",
        ]
    untried = check_policy(policy, r.max_context)
    if untried is not None:
        lines.append(f"{untried}: the run itself will check it")
    starting_drafter(config, policy)  # whether it can be used
    dtype = torch.bfloat16 if config.policy.mixed_precision == "bf16" else torch.float32
    place = this_machine(ranks, policy, dtype) if gpu is None else published_gpu(gpu)
    found = estimate(config, policy, ranks, place)
    sequences = cache_shape(config, policy)
    return [
        *lines,
        *_memory(found, place, ranks, sequences.slots, sequences.capacity),
        *_advice(config, found, place),
        *_time(config, found, place),
    ]


def size(amount: float) -> str:
    """Formats bytes for a reader, in units in which they are not 0.00."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6)):
        if amount >= factor / 10:
            return f"{amount / factor:.2f} {unit}" if unit == "GB" else f"{amount / factor:.1f} {unit}"
    return f"{amount / 1e3:.1f} kB"


def _memory(found: Estimate, place: DeviceSpec, ranks: int, slots: int, capacity: int) -> list[str]:
    each = "the rank" if ranks == 1 else f"each of the {ranks} ranks"
    lines = [f"memory of {each}, of {size(place.memory)} ({place.name}):"]
    width = max(len(part.what) for part in found.parts)
    for part in found.parts:
        note = ""
        if part.what == KEYS_AND_VALUES:
            note = f"  {slots} sequences of {capacity} tokens"
            if part.size < part.whole:
                note = (
                    f"  of {size(part.whole)} for{note[1:]}: {found.tokens // capacity} of full length at a "
                    f"time"
                )
        elif part.size < part.whole:
            note = f"  1/{ranks} of {size(part.whole)}"
        lines.append(f"  {part.what:<{width}}  {size(part.size):>10}{note}")
    return [*lines, f"  {'all':<{width}}  {size(found.total):>10}"]


def _advice(config: RunConfig, found: Estimate, place: DeviceSpec) -> list[str]:
    over = found.total - place.memory
    if over > 0:
        return [
            f"does not fit, by {size(over)}: shard over more ranks (scale.fsdp2=true), or lower "
            "update.tokens_per_microbatch or "
            "rollout.max_context"
        ]
    keys = next(part for part in found.parts if part.what == KEYS_AND_VALUES)
    if keys.size < keys.whole and config.rollout.kv_memory_gb is None:
        return [
            f"write rollout.kv_memory_gb={keys.size / 1e9:.3g}: without it the engine takes what is free at "
            "its start, before the "
            "first update has made its gradients and moments"
        ]
    return []


def _time(config: RunConfig, found: Estimate, place: DeviceSpec) -> list[str]:
    if found.rollout is None or found.update is None or place.bandwidth is None or place.flops is None:
        return [
            f"no time is estimated: the speed of {place.name} is not known; sizes that are: 24, 40, 48, 80, "
            "141, 192"
        ]
    return [
        f"100 steps without speculation: about {_seconds(100 * (found.rollout + found.update))}; "
        f"a step: rollouts {_seconds(found.rollout)}, update {_seconds(found.update)}",
        f"  reckoned from completions of {config.rollout.max_tokens // 2} tokens (half of "
        "rollout.max_tokens), "
        f"{place.bandwidth / 1e9:.3g} GB/s and {place.flops / 1e12:.2g} TFLOP/s of {place.name} "
        f"({place.speed_from})",
    ]


def _seconds(seconds: float) -> str:
    for unit, length in (("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
