"""Attention of draft anchors over real features and over their own earlier draft positions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from paceline.drafter_trainer.packing import DraftBatch
from paceline.rollout.drafters.eagle3_model import Attend
from paceline.rollout.model.attention import flash_serves


class UnrolledAttention:
    """Attends with the anchors of a batch; each call is the next draft position.

    It keeps the keys of position 0 (the real features, attended to causally within their piece) and, for each
    later position, one key per anchor.

    Args:
        batch: The batch.
        scaling: Factor of the products.
    """

    def __init__(self, batch: DraftBatch, scaling: float) -> None:
        self._batch, self._scaling = batch, scaling
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._rows = torch.arange(len(batch.pieces), device=batch.pieces.device)
        self._pieces: Pieces | None = None

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attends from queries [1, H, N, d] and keeps the keys and values [1, KV, N, d].

        Returns:
            Outputs [1, N, H, d].
        """
        flash = flash_serves(value)
        self._keys.append(key.to(value.dtype) if flash else key)
        self._values.append(value)
        if flash:
            if self._pieces is None:
                self._pieces = Pieces.of(self._batch)
            lines = [x[0].transpose(0, 1) for x in (query.to(value.dtype), *self._keys, *self._values)]
            return _Merged.apply(self._pieces, self._scaling, *lines)[None]
        return self._dense(query, self._rows, self._keys, self._values)

    def branch(self, rows: torch.Tensor) -> Attend:
        """Returns attention for anchors ``rows`` whose newest key and value are used once and not kept."""

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            keys = [self._keys[0], *(k[:, :, rows] for k in self._keys[1:]), key]
            values = [self._values[0], *(v[:, :, rows] for v in self._values[1:]), value]
            return self._dense(query, rows, keys, values)

        return attend

    def _dense(
        self, query: torch.Tensor, rows: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]
    ) -> torch.Tensor:
        """Attends from anchors ``rows`` and keeps all scores for the backward pass."""
        group = query.shape[1] // keys[0].shape[1]
        keys, values = ([x.repeat_interleave(group, dim=1) for x in line] for line in (keys, values))
        query = query * self._scaling
        masked = ~self._batch.attends(rows)
        scores = (query @ keys[0].transpose(-1, -2)).masked_fill(masked, float("-inf"))
        own = [(query * k).sum(-1, keepdim=True) for k in keys[1:]]
        weights = torch.softmax(torch.cat([scores, *own], dim=-1), dim=-1)
        anchors = scores.shape[-1]
        out = weights[..., :anchors] @ values[0]
        for step, v in enumerate(values[1:]):
            out = out + weights[..., anchors + step, None] * v
        return out.transpose(1, 2)


@dataclass(frozen=True, slots=True)
class Pieces:
    """Where the anchors of each piece end.

    Attributes:
        ends: int32 [P + 1], from 0 on.
        longest: Number of anchors of the longest piece.
    """

    ends: torch.Tensor
    longest: int

    @classmethod
    def of(cls, batch: DraftBatch) -> Pieces:
        """Returns those of a batch."""
        counts = torch.bincount(batch.pieces)
        ends = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        return cls(ends, int(counts.max()))


def flash_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pieces: Pieces, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attends causally within pieces.

    Args:
        query: [N, H, d].
        key: [N, KV, d].
        value: [N, KV, d].
        pieces: The pieces.
        scaling: Factor of the products.

    Returns:
        Outputs [N, H, d], log-sum-exps of the scaled scores float32 [H, N], and two tensors for the backward
        pass.
    """
    ends, longest = pieces.ends, pieces.longest
    attend = torch.ops.aten._flash_attention_forward
    return attend(query, key, value, ends, ends, longest, longest, 0.0, True, False, scale=scaling)[:4]


def flash_backward(
    grad: torch.Tensor,
    lines: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    merged: tuple[torch.Tensor, torch.Tensor],
    pieces: Pieces,
    scaling: float,
    state: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns the gradients of query, key and value.

    Args:
        grad: Gradient of the merged outputs, [N, H, d].
        lines: Query, key and value of `flash_forward`.
        merged: Outputs [N, H, d] and log-sum-exps float32 [H, N] of the softmax over these and further keys.
        pieces: The pieces.
        scaling: Factor of the products.
        state: What `flash_forward` returned for the backward pass.
    """
    ends, longest = pieces.ends, pieces.longest
    return torch.ops.aten._flash_attention_backward(
        grad, *lines, *merged, ends, ends, longest, longest, 0.0, True, *state, scale=scaling
    )


class _Merged(torch.autograd.Function):
    """Attends to the real features by flash attention, and merges one own key of each later draft position.

    The softmax over parts is merged by their log-sum-exps. In the backward pass, a part's gradients follow
    from the merged output and log-sum-exp alone: its weights are exp(score − log-sum-exp), and what the
    softmax takes off each is the product of the output and its gradient (Ring Attention, arXiv 2310.01889).
    """

    @staticmethod
    def forward(
        ctx: Any, pieces: Pieces, scaling: float, query: torch.Tensor, *lines: torch.Tensor
    ) -> torch.Tensor:
        """Returns outputs [N, H, d] of queries [N, H, d] and the keys, then the values [N, KV, d]."""
        keys, values = lines[: len(lines) // 2], lines[len(lines) // 2 :]
        first = query.contiguous(), keys[0].contiguous(), values[0].contiguous()
        found, logsumexp, *state = flash_forward(*first, pieces, scaling)
        group = query.shape[1] // keys[0].shape[1]
        scores = [_products(query, key, group) * scaling for key in keys[1:]]
        total = torch.logsumexp(torch.stack([logsumexp.T, *scores]), 0)  # [N, H]
        out = found.float() * torch.exp(logsumexp.T - total)[..., None]
        for score, value in zip(scores, values[1:], strict=True):
            out = out + torch.exp(score - total)[..., None] * value.repeat_interleave(group, 1)
        out = out.to(query.dtype)
        ctx.save_for_backward(out, total, *state, *first, *keys[1:], *values[1:])
        ctx.pieces, ctx.scaling, ctx.group = pieces, scaling, group
        return out

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of queries, keys and values."""
        out, total, *state, query, key, value = ctx.saved_tensors[:7]
        own, scaling, group = ctx.saved_tensors[7:], ctx.scaling, ctx.group
        grad = grad.contiguous()
        of_query, *firsts = flash_backward(
            grad, (query, key, value), (out, total.T.contiguous()), ctx.pieces, scaling, tuple(state)
        )
        taken = (grad.float() * out).sum(-1)  # [N, H]
        wide, of_keys, of_values = of_query.float(), [firsts[0]], [firsts[1]]
        for key, value in zip(own[: len(own) // 2], own[len(own) // 2 :], strict=True):
            weight = torch.exp(_products(query, key, group) * scaling - total)
            slope = (weight * (_products(grad, value, group) - taken) * scaling)[..., None]
            wide = wide + slope * key.repeat_interleave(group, 1)
            of_keys.append(_grouped(slope * query, group).to(key.dtype))
            of_values.append(_grouped(weight[..., None] * grad, group).to(value.dtype))
        return None, None, wide.to(query.dtype), *of_keys, *of_values


def _products(heads: torch.Tensor, line: torch.Tensor, group: int) -> torch.Tensor:
    """Returns the products of heads [N, H, d] with their own lines [N, KV, d], float32 [N, H]."""
    return (heads.float() * line.repeat_interleave(group, 1)).sum(-1)


def _grouped(heads: torch.Tensor, group: int) -> torch.Tensor:
    """Sums values [N, H, d] over the query heads of each key head: [N, KV, d]."""
    return heads.unflatten(1, (-1, group)).sum(2)
