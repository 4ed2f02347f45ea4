"""Lossless verification of a drawn chain as a whole."""

from __future__ import annotations

import torch

from paceline.rollout.native import upload
from paceline.rollout.sampling import draw
from paceline.rollout.trees import DraftTree, draft_mass
from paceline.rollout.verify.outcome import Uniforms, Verification, chain_path, drawn_from, subtract
from paceline.rollout.verify.verifier import verifier


@verifier("block", trees=False)
def verify_block(target_probs: torch.Tensor, draft: DraftTree, uniforms: Uniforms) -> Verification:
    """Verifies a chain by block verification.

    Sun et al., "Block Verification Accelerates Speculative Decoding", arXiv 2403.10444, Algorithm 2.

    Theorem (Sun et al., theorems 1 and 2). For draft tokens X_1 … X_n let w_0 = 1 and w_i = min(1, w_{i−1} ·
    p(X_i | X_{<i}) / q(X_i | X_{<i})). The accepted length τ is the *last* i whose own uniform is at most
    h_i::

        s_i = Σ_x max(0, w_i · p(x | X_{≤i}) − q(x | X_{≤i}))
        h_i = s_i / (s_i + 1 − w_i) for i < n,   h_n = w_n

    The next token is drawn from p if τ = n, else in proportion to max(0, w_τ · p − q) after X_τ. The
    committed tokens then have the target's distribution, and no verifier of a single chain accepts more
    tokens in expectation: a prefix that token-by-token verification would give up at its first rejection is
    kept if later tokens make up for it.

    The proof takes the draft's length at each prefix as given, so that the end of a chain may depend on its
    own earlier tokens.

    Every uniform influences every outcome: unlike in chain verification, none of them may be reused at the
    next step.

    Args:
        target_probs: float32 [B, N + 1, V], the processed distribution after the last committed token and
            after each draft token.
        draft: Chains of up to N nodes with ``probs``.
        uniforms: Random numbers of the step.

    Raises:
        ValueError: The draft is a tree.
    """
    q_mass = draft_mass(draft).double()
    p_mass = target_probs[:, :-1].gather(-1, draft.tokens[..., None])[..., 0].double()
    lengths = upload(draft.lengths, p_mass.device)
    weight = torch.ones_like(p_mass[:, 0])
    chosen, at_chosen = torch.zeros_like(lengths), weight
    for i in range(1, draft.nodes + 1):
        weight = (weight * p_mass[:, i - 1] / q_mass[:, i - 1].clamp(min=1e-300)).clamp(max=1)
        threshold = weight
        if i < draft.nodes:
            rest = (
                _weighted_residual(target_probs[:, i], weight, draft, torch.full_like(lengths, i))
                .double()
                .sum(-1)
            )
            total = rest + 1 - weight
            inner = torch.where(total > 0, rest / total.clamp(min=1e-300), 1.0)
            threshold = torch.where(lengths == i, weight, inner)
        keep = (uniforms.accept[:, i - 1].to(weight) < threshold) & (i <= lengths)
        chosen, at_chosen = torch.where(keep, i, chosen), torch.where(keep, weight, at_chosen)
    rows = torch.arange(len(chosen), device=chosen.device)
    p = target_probs[rows, chosen]
    rest = _weighted_residual(p, at_chosen, draft, chosen.clamp(max=draft.nodes - 1))
    weights = torch.where(((chosen < lengths) & (rest.sum(-1) > 0))[:, None], rest, p)
    return Verification(
        chain_path(draft), chosen, draw(weights, uniforms.target.gather(1, chosen[:, None])[:, 0])
    )


def _weighted_residual(
    p: torch.Tensor, weight: torch.Tensor, draft: DraftTree, nodes: torch.Tensor
) -> torch.Tensor:
    """Returns max(0, weight · p − q): [B, V], where q is what ``nodes`` int64 [B] were drawn from."""
    return subtract(p * weight[:, None].to(p), *drawn_from(draft, nodes))
