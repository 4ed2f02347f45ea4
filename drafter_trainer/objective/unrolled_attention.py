"""Attention of draft anchors over real features and over their own earlier draft positions."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch

from paceline.drafter_trainer.packing import DraftBatch
from paceline.rollout.drafters.eagle3_model import Attend
from paceline.rollout.model.attention import flash_serves
from paceline.rollout.native import upload


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
        self._piece_of, self._anchors, self._contexts = batch.pieces, batch.counts, batch.context.counts
        self._features = [a + c for a, c in zip(self._anchors, self._contexts, strict=True)]
        self._pieces = Pieces.of(self._anchors, self._features, batch.pieces.device)
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        """Attends from queries [1, H, N, d] and keeps the keys and values [1, KV, N, d].

        Returns:
            Outputs [1, N, H, d].
        """
        if not self._keys and self._context is not None:
            key, value = (self._by_piece(*x) for x in zip(self._context, (key, value), strict=True))
        flash = flash_serves(value)
        self._keys.append(key.to(value.dtype) if flash else key)
        self._values.append(value)
        if flash:
            lines = [x[0].transpose(0, 1) for x in (query.to(value.dtype), *self._keys, *self._values)]
            return _Merged.apply(self._pieces, self._scaling, *lines)[None]
        rows = torch.arange(query.shape[2], device=query.device)
        return self._dense(query, rows, self._anchors, self._keys, self._values)

    def _by_piece(self, context: torch.Tensor, anchors: torch.Tensor) -> torch.Tensor:
        """Returns the features of each piece after those of the piece before, its context first.

        Args:
            context: [1, KV, C, d].
            anchors: [1, KV, N, d].
        """
        before = context.to(anchors.dtype).split(self._contexts, 2)
        pairs = zip(before, anchors.split(self._anchors, 2), strict=True)
        return torch.cat([x for pair in pairs for x in pair], 2)

    def branch(self, rows: torch.Tensor) -> Attend:
        """Returns attention for anchors ``rows``, piece by piece, which does not keep the newest key."""

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            keys = [self._keys[0], *(k[:, :, rows] for k in self._keys[1:]), key]
            values = [self._values[0], *(v[:, :, rows] for v in self._values[1:]), value]
            return self._dense(query, rows, self._counts(rows), keys, values)

        return attend

    def at_once(self, kept: Sequence[torch.Tensor]) -> Attend:
        """Returns attention for several further draft positions in one call, which keeps no keys.

        Position 0 must be the only one that was attended from so far.

        Args:
            kept: Anchors of each further position, int64, ascending; each a subset of those before it. Their
                queries, keys and values come one position after another.
        """
        sizes = [len(rows) for rows in kept]

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            queries, keys, values = (x.split(sizes, 2) for x in (query, key, value))
            outs = []
            for step, rows in enumerate(kept):
                places = [torch.searchsorted(among, rows) for among in kept[: step + 1]]
                own_keys, own_values = (
                    [x[:, :, place] for x, place in zip(lines, places, strict=False)]
                    for lines in (keys, values)
                )
                own_keys, own_values = [self._keys[0], *own_keys], [self._values[0], *own_values]
                outs.append(self._subset(queries[step], rows, own_keys, own_values))
            return torch.cat(outs, 1)

        return attend

    def _subset(
        self, query: torch.Tensor, rows: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]
    ) -> torch.Tensor:
        """Attends from anchors ``rows`` [1, H, M, d], whose own keys and values are [1, KV, M, d] each.

        Flash attention knows no gaps between anchors, so that all anchors attend there.

        Returns:
            Outputs [1, M, H, d].
        """
        if not flash_serves(values[0]):
            return self._dense(query, rows, self._counts(rows), keys, values)
        (first_key, *own_keys), (first_value, *own_values) = keys, values

        def spread(lines: torch.Tensor) -> torch.Tensor:
            full = lines.new_zeros(sum(self._anchors), lines.shape[1], lines.shape[3])
            return full.index_copy(0, rows, lines[0].transpose(0, 1)).to(first_value.dtype)

        lines = [
            spread(query),
            *(first_key[0].transpose(0, 1), *map(spread, own_keys)),
            *(first_value[0].transpose(0, 1), *map(spread, own_values)),
        ]
        return _Merged.apply(self._pieces, self._scaling, *lines)[None, rows]

    def _counts(self, rows: torch.Tensor) -> list[int]:
        """Returns how many of the anchors ``rows`` each piece has."""
        return torch.bincount(self._piece_of[rows], minlength=len(self._anchors)).tolist()

    def _dense(
        self,
        query: torch.Tensor,
        rows: torch.Tensor,
        counts: Sequence[int],
        keys: list[torch.Tensor],
        values: list[torch.Tensor],
    ) -> torch.Tensor:
        """Attends from anchors ``rows``, ``counts`` of each piece.

        The backward pass keeps all scores. They exist within pieces only, so that they take memory linear in
        the batch.
        """
        firsts = accumulate(self._anchors[:-1], initial=0)
        lines = (keys[0].split(self._features, 2), values[0].split(self._features, 2))
        own_keys, own_values = ([x.split(counts, 2) for x in later] for later in (keys[1:], values[1:]))
        outs = []
        for piece, (queries, anchors, first, context, key, value) in enumerate(
            zip(query.split(counts, 2), rows.split(counts), firsts, self._contexts, *lines, strict=True)
        ):
            last = context + anchors - first  # its own feature in the piece
            own = ([x[piece] for x in line] for line in (own_keys, own_values))
            outs.append(_attend(queries * self._scaling, last, key, value, *own))
        return torch.cat(outs, 1)


def _attend(
    query: torch.Tensor,
    last: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    own_keys: Sequence[torch.Tensor],
    own_values: Sequence[torch.Tensor],
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


class Pieces(NamedTuple):
    """Where the anchors and the features of each piece end, as torch's packed attention takes it.

    Attributes:
        anchor_ends: int32 [P + 1], from 0 on.
        feature_ends: int32 [P + 1], from 0 on.
        longest: Number of anchors of the piece with the most.
        longest_features: Number of features of the piece with the most.
    """

    anchor_ends: torch.Tensor
    feature_ends: torch.Tensor
    longest: int
    longest_features: int

    @classmethod
    def of(cls, anchors: Sequence[int], features: Sequence[int], device: torch.device) -> Pieces:
        """Returns those of pieces with the given numbers of anchors and features."""
        anchor_ends, feature_ends = (
            upload(list(accumulate(counts, initial=0)), device).to(torch.int32)
            for counts in (anchors, features)
        )
        return cls(anchor_ends, feature_ends, max(anchors), max(features))


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
    return attend(query, key, value, *pieces, 0.0, True, False, scale=scaling)[:4]


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
        grad, *lines, *merged, *pieces, 0.0, True, *state, scale=scaling
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
