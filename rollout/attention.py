"""Attention over slots, plugged in through transformers' attention registry."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface

from rollout.native import RaggedTokens

SLOT_ATTENTION = "paceline_slots"
_FEW_QUERIES = 16  # up to here two batched products beat the fused kernel, which repeats the heads


@dataclass(slots=True)
class ForwardBatch:
    """Where one forward's tokens stand; handed through the model's keyword arguments to cache and attention.

    Attributes:
        rows: Slots that take part, contiguous. Not used where ``ragged`` is given.
        positions: int64 [B, Q], absolute position of each token; [1, N] where ``ragged`` is given.
        span: Keys that attention reads: positions ``0 .. span-1`` of each slot.
        from_start: Whether the tokens are one sequence's first ``span``, so that the mask is a plain triangle.
        ragged: The tokens without padding, for native kernels; None for a rectangle, for torch's operators.
    """

    rows: slice
    positions: torch.Tensor
    span: int
    from_start: bool = False
    ragged: RaggedTokens | None = None
    _bias: dict[int | None, torch.Tensor] = field(default_factory=dict)
    _rotations: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def bias(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Additive mask [B, 1, 1, Q, span]: 0 where the key is at most the query's position and inside the window."""
        if window not in self._bias:
            self._bias[window] = causal_bias(self.positions, self.span, window, dtype)[:, None, None]
        return self._bias[window]

    def rotation(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin [B, Q, d] for heads [B, Q, heads, d], as ``x * cos + x.roll(d / 2) * sin`` wants them.

        Rotating halves, ``(x1, x2) → (−x2, x1)``, is a roll whose first half changes sign: the sign goes into sin, once for
        all layers.
        """
        made = self._rotations.get(id(cos))
        if made is None or made[0] is not cos:
            half = sin.shape[-1] // 2
            signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
            made = self._rotations[id(cos)] = cos, cos.unsqueeze(2), signed.unsqueeze(2)
        return made[1], made[2]


def causal_bias(positions: torch.Tensor, span: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """[B, Q, span]: 0 for keys in ``(position - window, position]``, −inf elsewhere. positions: int64 [B, Q]."""
    keys = torch.arange(span, device=positions.device)
    hidden = keys > positions[..., None]
    if window is not None:
        hidden |= keys <= positions[..., None] - window
    return torch.zeros(hidden.shape, dtype=dtype, device=positions.device).masked_fill_(hidden, float("-inf"))


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
    out = torch.bmm(weights.view(batch * kv_heads, group * queries, span), value.reshape(batch * kv_heads, span, dim))
    return out.view(batch, heads, queries, dim).transpose(1, 2)


def slot_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    forward_batch: ForwardBatch,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """transformers' attention interface over `SlotCache`; ``forward_batch`` arrives through the model's keyword arguments.

    Raises:
        NotImplementedError: for attention sinks, which change the softmax.
    """
    if s_aux is not None:
        raise NotImplementedError("this model uses attention sinks, which the engine does not support")
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


AttentionInterface.register(SLOT_ATTENTION, slot_attention)
