"""Parts that verifiers share: the random numbers, the outcome, and the residual after a rejection."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.rollout.native import upload
from paceline.rollout.trees import DraftTree


@dataclass(frozen=True, slots=True)
class Uniforms:
    """Independent uniform random numbers in [0, 1).

    Attributes:
        target: float64 [B, N + 1], draws the token at depth d below the last committed one.
        accept: float64 [B, N], accepts or rejects node i. None of them may have been used for an earlier
            decision.
    """

    target: torch.Tensor
    accept: torch.Tensor


@dataclass(frozen=True, slots=True)
class Verification:
    """The outcome of a verification, one row for each sequence.

    Attributes:
        path: int64 [B, N], the accepted nodes, root first; arbitrary past ``accepted``.
        accepted: int64 [B], number of accepted nodes.
        next_token: int64 [B], the token that follows them.
    """

    path: torch.Tensor
    accepted: torch.Tensor
    next_token: torch.Tensor


def drawn_from(draft: DraftTree, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns the distribution that node ``nodes[b]`` of each row was drawn from.

    Returns:
        float32 [B, W], and the target ids of its entries, as in `DraftTree.vocabulary`.
    """
    assert draft.probs is not None
    rows = torch.arange(len(nodes), device=nodes.device)
    ids = draft.vocabulary
    if ids is not None and ids.ndim == 3:
        ids = ids[rows, nodes]
    return draft.probs[rows, nodes], ids


def subtract(p: torch.Tensor, q: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """Returns max(0, p − q), not normalised.

    Args:
        p: float32 [R, V].
        q: float32 [R, W] over the drafter's tokens.
        ids: int64 [W] or [R, W], target ids of the drafter's tokens, or None when W = V.

    Returns:
        float32 [R, V].
    """
    if ids is None:
        return (p - q).clamp_(min=0)
    ids = ids.expand_as(q)
    return p.scatter(-1, ids, (p.gather(-1, ids) - q).clamp_(min=0))


def residual(p: torch.Tensor, q: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """Returns max(0, p − q), normalised; the arguments are those of `subtract`.

    A row where it vanishes by rounding (p = q, where rejection has probability zero) returns p.
    """
    rest = subtract(p, q, ids)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, p)


def leading_run(kept: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Returns the length of each row's leading run of True within its first ``lengths`` entries.

    Args:
        kept: bool [B, N].
        lengths: int64 [B].

    Returns:
        int64 [B].
    """
    inside = torch.arange(kept.shape[1], device=kept.device) < upload(lengths, kept.device)[:, None]
    return (kept & inside).long().cumprod(-1).sum(-1)


def chain_path(draft: DraftTree) -> torch.Tensor:
    """Returns the path through a chain: int64 [B, N], the nodes in order."""
    return torch.arange(draft.nodes, device=draft.tokens.device).expand_as(draft.tokens)
