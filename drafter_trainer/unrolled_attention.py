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

    It keeps the keys of position 0 (the real features, attended to causally within their piece, the left
    context first) and, for each later position, one key per anchor.

    Args:
        batch: The batch.
        scaling: Factor of the products.
        context: Keys and values [1, KV, C, d] of the batch's left context; None if it has none.
    """

    def __init__(
        self,
        batch: DraftBatch,
        scaling: float,
        context: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> None:
        self._scaling, self._context = scaling, context
        self._piece_of, self._pieces = batch.pieces, Pieces.of(batch)
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attends from queries [1, H, N, d] and keeps the keys and values [1, KV, N, d].

        Returns:
            Outputs [1, N, H, d].
        """
        if not self._keys and self._context is not None:
            key, value = (
                torch.cat([before.to(own.dtype), own], 2)[:, :, self._pieces.order]
                for before, own in zip(self._context, (key, value), strict=True)
            )
        flash = flash_serves(value)
        self._keys.append(key.to(value.dtype) if flash else key)
        self._values.append(value)
        if flash:
            lines = [x[0].transpose(0, 1) for x in (query.to(value.dtype), *self._keys, *self._values)]
            return _Merged.apply(self._pieces, self._scaling, *lines)[None]
        rows = torch.arange(query.shape[2], device=query.device)
        return self._dense(query, rows, self._keys, self._values)

    def branch(self, rows: torch.Tensor) -> Attend:
        """Returns attention for anchors ``rows``, piece by piece, which does not keep the newest key."""

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            keys = [self._keys[0], *(k[:, :, rows] for k in self._keys[1:]), key]
            values = [self._values[0], *(v[:, :, rows] for v in self._values[1:]), value]
            return self._dense(query, rows, keys, values)

        return attend

    def _dense(
        self, query: torch.Tensor, rows: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]
    ) -> torch.Tensor:
        """Attends from anchors ``rows``, piece by piece, and keeps all scores for the backward pass.

        Scores exist within pieces only, so that they take memory linear in the batch.
        """
        anchors, features = self._pieces.anchor_ends, self._pieces.feature_ends
        counts = torch.bincount(self._piece_of[rows], minlength=len(anchors) - 1).tolist()
        # an anchor sees the features of its piece that come before it, and its own
        last = rows - (anchors[:-1] - self._pieces.contexts)[self._piece_of[rows]]
        lines = [x.split(features.diff().tolist(), 2) for x in (keys[0], values[0])]
        own = [x.split(counts, 2) for x in (*keys[1:], *values[1:])]
        outs = [
            _attend(
                queries * self._scaling, seen, key, value, later[: len(later) // 2], later[len(later) // 2 :]
            )
            for queries, seen, key, value, *later in zip(
                query.split(counts, 2), last.split(counts), *lines, *own, strict=True
            )
        ]
        return torch.cat(outs, 1)


def _attend(
    query: torch.Tensor,
    last: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    own_keys: list[torch.Tensor],
    own_values: list[torch.Tensor],
) -> torch.Tensor:
    """Attends from M anchors of a piece to its F features and to their own later draft positions.

    Args:
        query: [1, H, M, d], scaled.
        last: int64 [M], the last feature that each anchor attends to.
        key: [1, KV, F, d].
        value: [1, KV, F, d].
        own_keys: [1, KV, M, d] of each later draft position.
        own_values: [1, KV, M, d] of each later draft position.

    Returns:
        [1, M, H, d].
    """
    heads = query[0].unflatten(0, (key.shape[1], -1))  # [KV, H / KV, M, d]
    shape, features = heads.shape[1:3], key.shape[2]
    scores = (heads.flatten(1, 2) @ key[0].transpose(-1, -2)).unflatten(1, shape)
    masked = torch.arange(features, device=last.device) > last[:, None]
    own = [(heads * k[0][:, None]).sum(-1, keepdim=True) for k in own_keys]
    weights = torch.softmax(torch.cat([scores.masked_fill(masked, float("-inf")), *own], -1), -1)
    out = (weights[..., :features].flatten(1, 2) @ value[0]).unflatten(1, shape)
    for step, v in enumerate(own_values):
        out = out + weights[..., features + step, None] * v[0][:, None]
    return out.flatten(0, 1).transpose(0, 1)[None]


@dataclass(frozen=True, slots=True)
class Pieces:
    """Where the anchors of each piece end, and its features: those of its left context, then its anchors'.

    Attributes:
        anchor_ends: int32 [P + 1], from 0 on.
        feature_ends: int32 [P + 1], from 0 on.
        longest: Number of anchors of the piece with the most.
        longest_features: Number of features of the piece with the most.
        order: int64 [F], which of all contexts' and, after them, all anchors' features is next if they are
            put in the order of their pieces.
    """

    anchor_ends: torch.Tensor
    feature_ends: torch.Tensor
    longest: int
    longest_features: int
    order: torch.Tensor

    @classmethod
    def of(cls, batch: DraftBatch) -> Pieces:
        """Returns those of a batch."""
        anchors = torch.bincount(batch.pieces)
        features = anchors + torch.bincount(batch.context.pieces, minlength=len(anchors))
        anchor_ends, feature_ends = (
            torch.nn.functional.pad(n.cumsum(0), (1, 0)).to(torch.int32) for n in (anchors, features)
        )
        order = torch.cat([batch.context.pieces, batch.pieces]).argsort(stable=True)
        return cls(anchor_ends, feature_ends, int(anchors.max()), int(features.max()), order)

    @property
    def contexts(self) -> torch.Tensor:
        """The number of features before the anchors of each piece, int32 [P]."""
        return self.feature_ends.diff() - self.anchor_ends.diff()


def flash_forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pieces: Pieces, scaling: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attends within pieces: the last anchor to all features, each before it to one less.

    Args:
        query: [N, H, d].
        key: [F, KV, d].
        value: [F, KV, d].
        pieces: The pieces.
        scaling: Factor of the products.

    Returns:
        Outputs [N, H, d], log-sum-exps of the scaled scores float32 [H, N], and two tensors for the backward
        pass.
    """
    attend = torch.ops.aten._flash_attention_forward
    return attend(query, key, value, *_extents(pieces), 0.0, True, False, scale=scaling)[:4]


def _extents(pieces: Pieces) -> tuple[torch.Tensor, torch.Tensor, int, int]:
    """Returns the ends and longest pieces of queries and keys, as torch's operators take them."""
    return pieces.anchor_ends, pieces.feature_ends, pieces.longest, pieces.longest_features


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
    return torch.ops.aten._flash_attention_backward(
        grad, *lines, *merged, *_extents(pieces), 0.0, True, *state, scale=scaling
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
