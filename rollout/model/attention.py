"""Attention over slots, plugged in through transformers' attention registry."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from paceline.rollout.native import DeviceTokens, RaggedTokens
from paceline.rollout.transformers_api import register_attention

SLOT_ATTENTION = "paceline_slots"
# up to this many queries, two batched products beat the fused kernel, which repeats the heads
_FEW_QUERIES = 16
# Arguments of attention functions without effect here: models run in eval mode, and positions are already in
# the rotated queries and keys.
_IGNORED_ARGUMENTS = {
    "dropout", "position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states",
    "output_router_logits", "seen_attention", "forward_batch", "packed",
}  # fmt: skip


@dataclass(slots=True)
class ForwardBatch:
    """Describes where the tokens of one forward are; passed to cache and attention as a keyword argument.

    A token's seat consists of its position in the text, its place in the slot, and the two numbers that say
    which places it sees (trunk and ancestors, see `chain_seats`).

    Attributes:
        rows: Contiguous range of slots that take part. Unused if ``ragged`` is given.
        seats: Seats of the tokens, int64 [4, B, Q], from `chain_seats` or `tree_seats`; [4, 1, N] if
            ``ragged`` is given.
        span: Number of places of each slot that attention reads: ``0 .. span-1``.
        from_start: Whether the tokens are the first ``span`` of one sequence, so that a plain causal mask
            suffices.
        ragged: The tokens without padding, for native kernels; None for a padded rectangle, for torch
            operators.
    """

    rows: slice
    seats: torch.Tensor
    span: int
    from_start: bool = False
    ragged: RaggedTokens | DeviceTokens | None = None
    _bias: dict[int | None, torch.Tensor] = field(default_factory=dict)
    _rotations: dict[int, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    @property
    def positions(self) -> torch.Tensor:
        """The position of each token in its text, int64 [B, Q]."""
        return self.seats[0]

    @property
    def places(self) -> torch.Tensor:
        """The place in its slot where each token's key and value are stored, int64 [B, Q]."""
        return self.seats[1]

    def bias(self, window: int | None, dtype: torch.dtype) -> torch.Tensor:
        """Returns the additive mask [B, 1, 1, Q, span], which is 0 where the token sees the key."""
        if window not in self._bias:
            self._bias[window] = seat_bias(self.seats, self.span, window, dtype)[:, None, None]
        return self._bias[window]

    def rotation(self, cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns cos and sin prepared for ``x * cos + x.roll(d / 2) * sin``.

        Rotating halves, ``(x1, x2) → (−x2, x1)``, is a roll whose first half changes sign. The sign is moved
        into sin, once for all layers.

        Args:
            cos: Cosines [B, Q, d], to be applied to heads [B, Q, heads, d].
            sin: Sines [B, Q, d].

        Returns:
            cos and signed sin, [B, Q, 1, d] each.
        """
        cached = self._rotations.get(id(cos))
        if cached is None or cached[0] is not cos:
            half = sin.shape[-1] // 2
            signed = torch.cat([-sin[..., :half], sin[..., half:]], dim=-1)
            cached = self._rotations[id(cos)] = cos, cos.unsqueeze(2), signed.unsqueeze(2)
        return cached[1], cached[2]


def chain_seats(positions: torch.Tensor) -> torch.Tensor:
    """Returns the seats of consecutive tokens: position, place, trunk and ancestors.

    A token sees all places before its trunk's end. From there on it sees only its ancestors, given as bits;
    see `RaggedTokens`.

    Args:
        positions: Position of each token, int64 [B, Q].

    Returns:
        int64 [4, B, Q].
    """
    return torch.stack([positions, positions, positions + 1, torch.zeros_like(positions)])


def tree_seats(starts: torch.Tensor, depth: torch.Tensor, ancestors: torch.Tensor) -> torch.Tensor:
    """Returns the seats of each sequence's last committed token and the N draft nodes after it.

    Args:
        starts: Position of the last committed token, int64 [B].
        depth: Depth of each node from `tree_shape`, int64 [B, N].
        ancestors: Ancestors of each node from `tree_shape`, int64 [B, N].

    Returns:
        int64 [4, B, N + 1].
    """
    depth, ancestors = (torch.nn.functional.pad(x, (1, 0)) for x in (depth, ancestors))
    places = starts[:, None] + torch.arange(depth.shape[1], device=starts.device)
    return torch.stack([starts[:, None] + depth, places, (starts[:, None] + 1).expand_as(depth), ancestors])


def seat_bias(seats: torch.Tensor, span: int, window: int | None, dtype: torch.dtype) -> torch.Tensor:
    """Returns an additive mask [B, Q, span]: 0 for keys that a token sees, −inf elsewhere.

    Args:
        seats: Seats of the tokens, int64 [4, B, Q].
        span: Number of keys.
        window: Width of the sliding window in keys, the token's own included; None for no window.
        dtype: Floating-point dtype of the mask.
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
    """Computes grouped-query attention as two batched matrix products, without repeating heads.

    Args:
        query: Queries [B, H, Q, d].
        key: Keys [B, KV, T, d], contiguous so that nothing is copied; H is a multiple of KV.
        value: Values [B, KV, T, d].
        bias: Mask broadcastable to [B, KV, H/KV, Q, T], added to the scores.
        scaling: Factor on the scores.
        softcap: Soft cap, ``softcap * tanh(scores / softcap)``, applied before the bias; None for none.

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
    """Raises an error if attention computes more than scaled, causal, windowed and soft-capped products.

    Args:
        module: Attention module.
        mask: Mask given to its attention function. transformers builds none for our functions, so a mask is
            one that the module itself adds.
        others: All other arguments of the attention function, except scaling, window and soft cap.

    Raises:
        NotImplementedError: The attention is not supported; the message reads as a continuation of "this
            model".
    """
    if others.get("s_aux") is not None:
        raise NotImplementedError("uses attention sinks, which change the softmax")
    if mask is not None:
        raise NotImplementedError(f"adds its own mask to the attention scores of {type(module).__name__}")
    unknown = sorted(
        name for name, value in others.items() if value is not None and name not in _IGNORED_ARGUMENTS
    )
    if unknown:
        raise NotImplementedError(f"passes {', '.join(unknown)} to its attention, whose effect is unknown")


def check_window(module: nn.Module, window: int | None) -> None:
    """Raises an error if the attention has a sliding window that only transformers' mask knows about.

    Args:
        module: Attention module of a layer.
        window: Window passed to its attention function.

    Raises:
        NotImplementedError: The window is not passed; the message reads as a continuation of "this model".
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
            f"does not pass the width of its sliding window to the attention of {type(module).__name__}"
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
    """Implements transformers' attention interface over a `SlotCache`.

    ``forward_batch`` arrives through the model's keyword arguments.

    Raises:
        NotImplementedError: The attention computes something else; see `check_attention`.
        TypeError: The model does not pass its caller's keyword arguments to its attention functions.
    """
    if forward_batch is None:
        raise TypeError("the model does not pass its caller's keyword arguments to its attention functions")
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


def flash_serves(heads: torch.Tensor) -> bool:
    """Returns whether torch's flash attention serves heads [..., d] of this device, dtype and size."""
    half = heads.dtype in (torch.bfloat16, torch.float16)
    return heads.device.type == "cuda" and half and heads.shape[-1] % 8 == 0 and heads.shape[-1] <= 256
