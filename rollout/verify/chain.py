"""Lossless verification of a draft chain at any temperature."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rollout.sampling import draw
from rollout.trees.chain import DraftTree
from rollout.verify.deterministic import Verification, leading_run, verify_deterministic


@dataclass(frozen=True, slots=True)
class ChainUniforms:
    """Independent uniforms in [0, 1): float64 [B, N + 1] that draw tokens, float64 [B, N] that accept."""

    target: torch.Tensor
    accept: torch.Tensor


def verify_chain(target_probs: torch.Tensor, draft: DraftTree, uniforms: ChainUniforms) -> Verification:
    """Speculative sampling (Leviathan et al., arXiv 2211.17192, Algorithm 1; Chen et al., arXiv 2302.01318, Algorithm 2).

    Theorem (Leviathan et al., appendix A.1). Let p be the target's distribution at a node and q the one that the draft token
    x was drawn from. Accept x with probability min(1, p(x)/q(x)); on rejection draw from the residual
    r(y) ∝ max(0, p(y) − q(y)). Then the token kept has distribution p, whatever q is::

        P(y) = q(y)·min(1, p(y)/q(y)) + (1 − Σ_x min(p(x), q(x))) · r(y) = min(p, q)(y) + max(0, p − q)(y) = p(y)

    since 1 − Σ min(p, q) = Σ max(0, p − q) is just what normalises r. When every draft token is kept, one more is drawn from p.

    Deterministic drafts are the case q = δ_x, see `verify_deterministic`.

    Args:
        target_probs: float32 [B, N + 1, V], the processed distribution after the root and after each draft token.
        draft: A chain of N nodes.
        uniforms: The random numbers.

    Returns:
        Accepted counts and next tokens.
    """
    batch, nodes, vocab = target_probs.shape
    if draft.probs is None or draft.tokens.shape[1] == 0:
        drawn = draw(target_probs.reshape(-1, vocab), uniforms.target.reshape(-1)).view(batch, nodes)
        return verify_deterministic(drawn, draft)
    return _verify_sampled(target_probs, draft, uniforms)


def _verify_sampled(target_probs: torch.Tensor, draft: DraftTree, uniforms: ChainUniforms) -> Verification:
    assert draft.probs is not None
    p = target_probs[:, :-1].gather(-1, draft.tokens[..., None])[..., 0].double()
    q = _draft_mass(draft).double()
    lengths = draft.lengths.to(p.device)
    accepted = leading_run(uniforms.accept.to(p) * q < p, lengths)
    rows = torch.arange(len(accepted), device=accepted.device)
    weights = target_probs[rows, accepted]
    at = accepted.clamp(max=draft.tokens.shape[1] - 1)
    # of every row: picking out the rejected ones would wait for a GPU
    rest = residual(weights, draft.probs[rows, at], draft.vocabulary)
    weights = torch.where((accepted < lengths)[:, None], rest, weights)
    return Verification(accepted, draw(weights, uniforms.target.gather(1, accepted[:, None])[:, 0]))


def _draft_mass(draft: DraftTree) -> torch.Tensor:
    """q(x) of each draft token: float32 [B, N]."""
    assert draft.probs is not None
    if draft.vocabulary is None:
        return draft.probs.gather(-1, draft.tokens[..., None])[..., 0]
    column = torch.searchsorted(draft.vocabulary, draft.tokens).clamp_(max=len(draft.vocabulary) - 1)
    return draft.probs.gather(-1, column[..., None])[..., 0]


def residual(p: torch.Tensor, q: torch.Tensor, vocabulary: torch.Tensor | None) -> torch.Tensor:
    """max(0, p − q), not normalised.

    Args:
        p: float32 [R, V].
        q: float32 [R, W] over the drafter's tokens.
        vocabulary: int64 [W], their target ids in increasing order, or None when W = V.

    Returns:
        float32 [R, V]. A row whose residual vanishes by rounding (p = q, where rejection has probability zero) gives p.
    """
    rest = p.clone()
    if vocabulary is None:
        rest -= q
    else:
        rest[:, vocabulary] -= q
    rest.clamp_(min=0)
    empty = rest.sum(-1, keepdim=True) <= 0
    return torch.where(empty, p, rest)
