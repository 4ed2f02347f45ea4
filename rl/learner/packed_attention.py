"""Attention of packed sequences: a token attends to its prompt and to its own sample only."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn

from paceline.rl.learner.packing import PackedBatch
from paceline.rollout.model.attention import check_attention, check_window, flash_serves, grouped_attention
from paceline.rollout.transformers_api import register_attention

PACKED_ATTENTION = "paceline_packed"


class _ToRows(torch.autograd.Function):
    """Maps the packed layout [T, …] to the padded one [n, L, …].

    The gradient is a gather. Indexing would use an accumulating scatter, which is slow and not needed: only
    padding is read twice, and it never receives a gradient.
    """

    @staticmethod
    def forward(ctx: Any, line: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
        """Returns the padded layout."""
        ctx.packed = packed
        return line[packed.pad_index]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Returns the gradient in the packed layout."""
        return grad.flatten(0, 1)[ctx.packed.flat_index], None


class _ToLine(torch.autograd.Function):
    """Maps the padded layout [n, L, …] to the packed one [T, …]: the inverse of `_ToRows`."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, packed: PackedBatch) -> torch.Tensor:
        """Returns the packed layout."""
        ctx.packed, ctx.shape = packed, rows.shape
        return rows.flatten(0, 1)[packed.flat_index]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Returns the gradient in the padded layout."""
        rows = grad.new_zeros(ctx.shape)
        rows.view(-1, *ctx.shape[2:]).index_copy_(0, ctx.packed.flat_index, grad.contiguous())
        return rows, None


class _ToKeys(torch.autograd.Function):
    """Maps the packed layout [T, …] to the keys of all sequences [K, …].

    A prompt's tokens are keys of each of its samples, too; their gradients are summed in float32.
    """

    @staticmethod
    def forward(ctx: Any, line: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Returns the keys."""
        ctx.keys, ctx.tokens = keys, len(line)
        return line[keys]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Returns the gradient in the packed layout."""
        line = torch.zeros(ctx.tokens, *grad.shape[1:], dtype=torch.float32, device=grad.device)
        return line.index_add_(0, ctx.keys, grad.float()).to(grad.dtype), None


def packed_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    packed: PackedBatch | None = None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """Attends within packed sequences, through transformers' attention interface.

    On a GPU in 16 bits this is flash attention over sequences of different lengths, without padding and
    without a mask. Elsewhere it works on a padded layout, while linear layers see the T real tokens.

    Args:
        module: The attention layer.
        query: Queries, [1, H, T, d].
        key: Keys, [1, KV, T, d].
        value: Values, [1, KV, T, d].
        attention_mask: Must be None; ``packed`` says what is visible.
        packed: The layout, which the model passes on from its caller.
        scaling: Factor of the products; None is d ** -0.5.
        sliding_window: Tokens that a query reaches back; None is all of them.
        softcap: Soft cap of the products, or None.
        **others: Further arguments of the interface.

    Returns:
        The outputs, [1, T, H, d], and None for the weights.

    Raises:
        NotImplementedError: for attention that computes something else, see
            `paceline.rollout.model.attention.check_attention`.
        TypeError: when the model does not pass its caller's keyword arguments on.
    """
    if packed is None:
        raise TypeError("its attention functions get no keyword arguments of the model's caller")
    check_attention(module, attention_mask, others)
    check_window(module, sliding_window)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    # Under autocast, rotary embeddings return float32, and so would softmax. Keeping the values' precision
    # takes a quarter less memory.
    lines = [x[0].transpose(0, 1).to(value.dtype) for x in (query, key, value)]
    with torch.autocast(query.device.type, enabled=False):
        if softcap is None and flash_serves(lines[0]):
            return _without_padding(lines, packed, scaling, sliding_window)[None], None
        return _padded(lines, packed, scaling, sliding_window, softcap)[None], None


def _without_padding(
    lines: list[torch.Tensor], packed: PackedBatch, scaling: float, window: int | None
) -> torch.Tensor:
    """Returns the outputs [T, H, d] of queries [T, H, d] and keys and values [T, KV, d], by flash attention.

    The last query of a sequence stands at its last key, and each sees the keys up to its own.
    """
    segments = packed.segments
    query, *pair = lines
    key, value = (_ToKeys.apply(x, segments.keys) for x in pair)
    out = varlen_attn(
        query.contiguous(),
        key,
        value,
        segments.query_ends,
        segments.key_ends,
        segments.most_queries,
        segments.most_keys,
        scale=scaling,
        window_size=(-1 if window is None else window - 1, 0),
        enable_gqa=True,
    )
    assert isinstance(out, torch.Tensor)  # it was not asked for log-sum-exps
    return out


def _padded(
    lines: list[torch.Tensor],
    packed: PackedBatch,
    scaling: float,
    window: int | None,
    softcap: float | None,
) -> torch.Tensor:
    """Returns what `_without_padding` does, on a padded layout with a mask.

    On a CPU it consists of two batched products, because the backward of SDPA is slower there at the lengths
    of a micro-batch.
    """
    visible = packed.visible
    if window is not None:
        near = packed.pad_positions[:, None, :] > packed.pad_positions[:, :, None] - window
        visible = visible & near
    q, k, v = (_ToRows.apply(x, packed).transpose(1, 2) for x in lines)
    if q.device.type == "cpu" or softcap is not None:
        bias = (
            torch.zeros((), dtype=q.dtype, device=q.device)
            .expand(visible.shape)
            .masked_fill(~visible, float("-inf"))
        )
        out = grouped_attention(q, k.contiguous(), v.contiguous(), bias[:, None, None], scaling, softcap)
    else:
        # with a mask and fewer key heads, SDPA would keep all scores: it has no efficient kernel for that
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        attend = nn.functional.scaled_dot_product_attention
        out = attend(q, k, v, attn_mask=visible[:, None], scale=scaling).transpose(1, 2)
    return _ToLine.apply(out, packed)


register_attention(PACKED_ATTENTION, packed_attention)
