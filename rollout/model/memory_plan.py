"""Plan of a GPU's memory: what the keys and values get, decided before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig

from paceline.rollout.graphs.graph_plan import (
    MOST_ROWS,
    GraphKey,
    GraphPlan,
    ModelShape,
    plan_graphs,
    plan_keys,
    token_buckets,
)
from paceline.rollout.model.kv_cache import CacheShape
from paceline.rollout.model.shape import intermediate_size

# cuBLAS keeps this for each stream that it has seen
WORKSPACE_BYTES = 32 * 2**20
_SPARE = 20  # one part in this many is left for what the allocator cannot use
_UNPLANNED = 5  # one part in this many is left for drafters and an update of which nothing is known


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Says what takes the memory of a GPU.

    Attributes:
        room: Bytes that the process may use, those that it already holds included.
        parts: Bytes of everything but keys and values, by what takes them.
        cache: Bytes for keys, values and taps.
    """

    room: int
    parts: Mapping[str, int]
    cache: int

    def __str__(self) -> str:
        listed = {**self.parts, "keys and values": self.cache}
        return f"{gigabytes(self.room)} GB: {_listed(listed)}"


def plan_memory(
    room: int, parts: Mapping[str, int], shape: CacheShape, limit: int | None = None
) -> MemoryPlan:
    """Returns the plan in which keys and values get what they want, or what the other parts leave.

    A twentieth of the room is kept for fragmentation.

    Args:
        room: Bytes that the process may use, those that it already holds included.
        parts: Bytes of everything but keys and values at their peak, by what takes them.
        shape: Size of the cache of keys and values.
        limit: Bytes that it may take at most; None for all that is left.

    Raises:
        MemoryError: It does not fit, or not even one sequence does. The message has the numbers.
    """
    parts = {**parts, "spare": spare_bytes(room)}
    left = room - sum(parts.values())
    least, full = (tokens * shape.token_bytes for tokens in (shape.capacity, shape.slots * shape.capacity))
    wanted = full if limit is None else min(full, limit)
    needed = least if limit is None else wanted
    if needed > left:
        what = f"one sequence of {shape.capacity} tokens" if limit is None else "rollout.kv_memory_gb"
        raise MemoryError(
            f"the GPU's {gigabytes(room)} GB do not hold {gigabytes(needed)} GB of keys and values ({what}) "
            f"beside the rest, {_listed(parts)}: lower rollout.kv_memory_gb, rollout.max_context, "
            "rollout.max_slots or update.tokens_per_microbatch, or shard over more ranks (scale.fsdp2=true)"
        )
    return MemoryPlan(room, parts, min(wanted, left))


def spare_bytes(room: int) -> int:
    """Returns the bytes that are left for what the allocator cannot use."""
    return room // _SPARE


def gigabytes(size: int) -> str:
    """Formats bytes in GB of 10⁹ bytes with three digits."""
    return f"{size / 1e9:.3g}"


def _listed(parts: Mapping[str, int]) -> str:
    """Lists the parts that take memory, largest first."""
    ordered = sorted(((size, what) for what, size in parts.items() if size), reverse=True)
    return ", ".join(f"{what} {gigabytes(size)}" for size, what in ordered)


def model_shape(config: PreTrainedConfig, shape: CacheShape) -> ModelShape:
    """Returns the sizes that the activations of a policy's forward depend on."""
    text = config.get_text_config()
    return ModelShape(
        layers=shape.layers,
        hidden=text.hidden_size,
        intermediate=intermediate_size(text),
        heads=text.num_attention_heads,
        kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        vocab=text.vocab_size,
        bytes_per_value=shape.dtype.itemsize,
    )


def ragged_graphs(sizes: ModelShape, phase: str, most: int, span: int) -> GraphPlan:
    """Returns the graphs of forwards without padding, of up to ``most`` tokens.

    Without padding, a forward's shape is its number of tokens alone, whatever the batch and the drafts.
    """
    rows = token_buckets(most)
    return plan_graphs(sizes, plan_keys(phase, (1,), rows, (span,), rows[-1]))


def forward_parts(sizes: ModelShape, slots: int, prefill_tokens: int) -> dict[str, int]:
    """Returns the bytes that decoding takes beside weights, keys and values, on kernels that keep no scores.

    Args:
        sizes: Sizes of the policy.
        slots: Number of sequences decoded together.
        prefill_tokens: Maximum number of prompt tokens that one forward reads.
    """
    rows = max(MOST_ROWS, slots)
    widest = sizes.activation_bytes(GraphKey("target", 1, max(rows, prefill_tokens), 0))
    # logits, and float32 copies of them while drafts are verified
    logits = rows * sizes.vocab * (sizes.bytes_per_value + 3 * 4)
    graphs = ragged_graphs(sizes, "target", rows, 0)
    return {
        # the workspaces of the default stream and of the one of captures
        "captured graphs": graphs.total_bytes + 2 * WORKSPACE_BYTES,
        "a forward's activations": widest + logits,
    }


def weight_parts(model: nn.Module, dtype: torch.dtype) -> dict[str, int]:
    """Returns the bytes of a policy's weights and of their casts to the engine's dtype."""
    weights = list(model.parameters())
    casts = (p.numel() for p in weights if p.dtype != dtype and p.is_floating_point())
    return {
        "the policy's weights": sum(p.nbytes for p in weights),
        "the engine's casts of them": sum(casts) * dtype.itemsize,
    }


def process_room(device: torch.device) -> int:
    """Returns the bytes of a GPU that this process may use: what is free, and what it already holds."""
    return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)


def engine_plan(
    model: nn.Module,
    shape: CacheShape,
    sizes: ModelShape,
    prefill_tokens: int,
    others: Mapping[str, int] | None,
    limit: int | None,
) -> MemoryPlan:
    """Returns the plan of the GPU that a policy and the engine that decodes it share.

    Args:
        model: The policy.
        shape: Size of the cache of keys and values.
        sizes: Sizes of the policy.
        prefill_tokens: Maximum number of prompt tokens that one forward reads.
        others: Bytes that the trainer and drafters take at their peak, by what takes them. None if nothing is
            known of them: a fifth of the GPU is left for them, unless ``limit`` says what to take.
        limit: Bytes of keys and values at most; None for all that is left.

    Raises:
        MemoryError: It does not fit.
    """
    room = process_room(next(model.parameters()).device)
    if others is None:
        others = {"drafters and an update, not planned": room // _UNPLANNED} if limit is None else {}
    own = {**weight_parts(model, shape.dtype), **forward_parts(sizes, shape.slots, prefill_tokens)}
    return plan_memory(room, {**own, **others}, shape, limit)
