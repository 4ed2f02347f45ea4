"""What verifiers share: the random numbers, the outcome, and the residual of a rejection."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.rollout.trees import DraftTree


@dataclass(frozen=True, slots=True)
class Uniforms:
    """Independent uniforms in [0, 1).

    Attributes:
        target: float64 [B, N + 1], draws the token at depth d below the last committed one.
        accept: float64 [B, N], accepts or rejects node i. None of them may have decided anything before.
    """

    target: torch.Tensor
    accept: torch.Tensor


@dataclass(frozen=True, slots=True)
class Verification:
    """Outcome for each row.

    Attributes:
        path: int64 [B, N], the accepted nodes, root first; arbitrary past ``accepted``.
        accepted: int64 [B], how many nodes are kept.
        next_token: int64 [B], the token that follows them.
    """

    path: torch.Tensor
    accepted: torch.Tensor
    next_token: torch.Tensor


def drawn_from(draft: DraftTree, nodes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What node ``nodes[b]`` of each row was drawn from: float32 [B, W], and the target ids of its entries as
    in `DraftTree`.
    """
    assert draft.probs is not None
    rows = torch.arange(len(nodes), device=nodes.device)
    own = draft.vocabulary is not None and draft.vocabulary.ndim == 3
    return draft.probs[rows, nodes], draft.vocabulary[
        rows, nodes
    ] if own and draft.vocabulary is not None else draft.vocabulary


def subtract(p: torch.Tensor, q: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """max(0, p − q), not normalised.

    Args:
        p: float32 [R, V].
        q: float32 [R, W] over the drafter's tokens.
        ids: int64 [W] or [R, W], their target ids, or None when W = V.

    Returns:
        float32 [R, V].
    """
    if ids is None:
        return (p - q).clamp_(min=0)
    ids = ids.expand_as(q)
    return p.scatter(-1, ids, (p.gather(-1, ids) - q).clamp_(min=0))


def residual(p: torch.Tensor, q: torch.Tensor, ids: torch.Tensor | None) -> torch.Tensor:
    """max(0, p − q) normalised; arguments as in `subtract`. A row where it vanishes by rounding (p = q, where
    rejection has probability zero) gives p.
    """
    rest = subtract(p, q, ids)
    total = rest.sum(-1, keepdim=True)
    return torch.where(total > 0, rest / total, p)


def leading_run(kept: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Length of each row's leading run of True within its first ``lengths`` entries. bool [B, N], int64 [B] →
    int64 [B].
    """
    inside = torch.arange(kept.shape[1], device=kept.device) < lengths.to(kept.device)[:, None]
    return (kept & inside).long().cumprod(-1).sum(-1)


def chain_path(draft: DraftTree) -> torch.Tensor:
    """The path through a chain: int64 [B, N]."""
    return torch.arange(draft.nodes, device=draft.tokens.device).expand_as(draft.tokens)
