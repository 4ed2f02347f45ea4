"""Attention over slots, plugged in through transformers' attention registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from paceline.rollout.native import RaggedTokens
from paceline.rollout.transformers_api import register_attention

SLOT_ATTENTION = "paceline_slots"
_FEW_QUERIES = 16  # up to here two batched products beat the fused kernel, which repeats the heads
# Arguments of attention functions that change nothing: models run in eval mode, positions are in the rotated
#     queries and keys.
_WITHOUT_EFFECT = {
    "dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits", "seen_attention", "forward_batch", "packed",
}  # fmt: skip


@dataclass(slots=True)
class ForwardBatch:
    """Where one forward's tokens stand; handed through the model's keyword arguments to cache and attention.

    Attributes:
        rows: Slots that take part, contiguous. Not used where ``ragged`` is given.
        seats: int64 [4, B, Q], see `chain_seats` and `tree_seats`; [4, 1, N] where ``ragged`` is given.
        span: Keys that attention reads: places ``0 .. span-1`` of each slot.
        from_start: Whether the tokens are one sequence's first ``span``, so that the mask is a plain
            triangle.
        ragged: The tokens without padding, for native kernels; None for a rectangle, for torch's operators.
    """

    rows: slice
    seats: torch.Tensor
    span: int
    from_start: bool = False
    ragged: RaggedTokens | None = None
    _bias: dict[int | None, torch.Tensor] = field(default_factory=dict)
    _rotations: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def positions(self) -> torch.Tensor:
        """int64 [B, Q], position of each token in its text."""
        return self.seats[0]

    @property
    def places(self) -> torch.Tensor:
        """int64 [B, Q], where in its slot each token's keys go."""
        return self.seats[1]

    def bias(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask [B, 1, 1, Q, span]: 0 where the token sees the key."""
        if window not in self._bias:
            self._bias[window] = seat_bias(self.seats, self.span, window, dtype)[:, None, None]
        return self._bias[window]

    def rotation(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B, Q, d] for heads [B, Q, heads, d], as ``x * cos + x.roll(d / 2) * sin`` wants them.

        Rotating halves, ``(x1, x2) → (−x2, x1)``, is a roll whose first half changes sign: the sign goes into
        sin, once for all layers.
        """
        made = self._rotations.get(id(cos))
        if made is None or made[0] is not cos:
            half = sin.shape[-1] // 2
            signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
            made = self._rotations[id(cos)] = cos, cos.unsqueeze(2), signed.unsqueeze(2)
        return made[1], made[2]


def chain_seats(positions: torch.Tensor) -> torch.Tensor:
    """Seats int64 [4, B, Q] of consecutive tokens at int64 positions [B, Q]: position, place, trunk and
    ancestors.

    A token sees the places before its trunk's end, and those from there on that are its ancestors' (bits);
    see `RaggedTokens`.
    """
    return torch.stack([positions, positions, positions + 1, torch.zeros_like(positions)])


def tree_seats(starts: torch.Tensor, depth: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
    """Seats int64 [4, B, N + 1] of the last committed token at ``starts`` int64 [B] and the N nodes of a
    draft tree after it.

    Args:
        starts: Position of the last committed token.
        depth: int64 [B, N], of `tree_shape`.
        ancestors: int64 [B, N], of `tree_shape`.
    """
    depth, ancestors = (torch.nn.functional.pad(x, (1, 0)) for x in (depth, ancestors))
    places = starts[:, None] + torch.arange(depth.shape[1], device=starts.device)
    return torch.stack([starts[:, None] + depth, places, (starts[:, None] + 1).expand_as(depth), ancestors])


def seat_bias(seats: torch.Tensor, span: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """[B, Q, span]: 0 for keys that a token sees, −inf elsewhere. seats: int64 [4, B, Q]; window: keys, its
    own included.
    """
    positions, _, trunks, ancestors = (x[..., None] for x in seats)
    keys = torch.arange(span, device=seats.device)
    beyond = (keys - trunks).clamp(0, 63)
    hidden = (keys >= trunks) & ((ancestors >> beyond & 1 == 0) | (keys - trunks > 62))
    if window is not None:
        hidden |= (keys <= positions - window) & (keys < trunks)
    return torch.zeros(hidden.shape, dtype=dtype, device=seats.device).masked_fill_(hidden, float("-inf"))


def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    bias: torch.Tensor,
    scaling: float,
    softcap: float | None = None,
) -> torch.Tensor:
    """Attention with grouped key/value heads as two batched matrix products, heads never repeated.

    Args:
        query: [B, H, Q, d].
        key: [B, KV, T, d], contiguous so that nothing is copied; H is a multiple of KV.
        value: [B, KV, T, d].
        bias: Broadcastable to [B, KV, H/KV, Q, T], added to the scores.
        scaling: Factor on the scores.
        softcap: ``softcap * tanh(scores / softcap)`` before the bias, where given.

    Returns:
        [B, Q, H, d].
    """
    batch, heads, queries, dim = query.shape
    kv_heads, span = key.shape[1], key.shape[2]
    group = heads // kv_heads
    rows = (query * scaling).reshape(batch * kv_heads, group * queries, dim)
    scores = torch.bmm(rows, key.reshape(batch * kv_heads, span, dim).transpose(1, 2))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.softmax(scores.view(batch, kv_heads, group, queries, span) + bias, dim=-1)
    out = torch.bmm(
        weights.view(batch * kv_heads, group * queries, span), value.reshape(batch * kv_heads, span, dim)
    )
    return out.view(batch, heads, queries, dim).transpose(1, 2)


def check_attention(module: nn.Module, mask: torch.Tensor | None, others: Mapping[str, Any]) -> None:
    """Refuses attention that computes more than scaled, causal, windowed and soft-capped products.

    Args:
        module: The attention module.
        mask: Given to its attention function; transformers makes none for functions of ours, so that one is
            the module's own.
        others: All other arguments of the attention function, except scaling, window and soft-capping.

    Raises:
        NotImplementedError: with the reason, to be read after "this model".
    """
    if others.get("s_aux") is not None:
        raise NotImplementedError("uses attention sinks, which change the softmax")
    if mask is not None:
        raise NotImplementedError(f"adds a mask of its own to the scores of {type(module).__name__}")
    unknown = sorted(
        name for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT
    )
    if unknown:
        raise NotImplementedError(f"hands {', '.join(unknown)} to its attention, whose effect is not known")


def check_window(module: nn.Module, window: int | None) -> None:
    """Refuses attention whose window only transformers' mask knows.

    Args:
        module: The attention module of a layer.
        window: What its attention function is told.

    Raises:
        NotImplementedError: with the reason, to be read after "this model".
    """
    kinds, index = (
        getattr(getattr(module, "config", None), "layer_types", None),
        getattr(module, "layer_idx", None),
    )
    if (
        kinds
        and index is not None
        and index < len(kinds)
        and kinds[index] == "sliding_attention"
        and window is None
    ):
        raise NotImplementedError(
            f"does not tell the attention of {type(module).__name__} how wide its window is"
        )


def slot_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    forward_batch: ForwardBatch | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over `SlotCache`; ``forward_batch`` arrives through the model's
    keyword arguments.

    Raises:
        NotImplementedError: for attention that computes something else, see `check_attention`.
        TypeError: when the model hands its caller's keyword arguments to no attention function.
    """
    if forward_batch is None:
        raise TypeError("its attention functions get no keyword arguments of the model's caller")
    check_attention(module, attention_mask, others)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    if query.shape[2] <= _FEW_QUERIES or softcap is not None:
        bias = forward_batch.bias(sliding_window, query.dtype)
        return grouped_attention(query, key, value, bias, scaling, softcap), None
    triangle = forward_batch.from_start and sliding_window is None
    mask = None if triangle else forward_batch.bias(sliding_window, query.dtype)[:, :, 0]
    out = nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=triangle, scale=scaling, enable_gqa=True
    )
    return out.transpose(1, 2), None


register_attention(SLOT_ATTENTION, slot_attention)
