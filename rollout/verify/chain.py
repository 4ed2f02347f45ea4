"""Lossless verification of a drawn chain, token by token."""

from __future__ import annotations

import torch

from paceline.rollout.native import upload
from paceline.rollout.sampling import draw
from paceline.rollout.trees import DraftTree, draft_mass
from paceline.rollout.verify.outcome import (
    Uniforms,
    Verification,
    chain_path,
    drawn_from,
    leading_run,
    residual,
)
from paceline.rollout.verify.verifier import verifier


@verifier("chain", trees=False)
def verify_chain(target_probs: torch.Tensor, draft: DraftTree, uniforms: Uniforms) -> Verification:
    """Verifies a chain by speculative sampling.

    Leviathan et al., arXiv 2211.17192, Algorithm 1; Chen et al., arXiv 2302.01318, Algorithm 2.

    Theorem (Leviathan et al., appendix A.1). Let p be the target's distribution at a node and q the
    distribution that the draft token x was drawn from. Accept x with probability min(1, p(x)/q(x)); on
    rejection, draw from the residual r(y) ∝ max(0, p(y) − q(y)). Then the kept token has distribution p,
    whatever q is::

        P(y) = q(y)·min(1, p(y)/q(y)) + (1 − Σ_x min(p(x), q(x))) · r(y)
             = min(p, q)(y) + max(0, p − q)(y)
             = p(y)

    since 1 − Σ min(p, q) = Σ max(0, p − q) is exactly the normaliser of r. When every draft token is
    accepted, one more token is drawn from p. Whether a further token was drafted may depend on the tokens
    before it: the theorem is applied conditionally on them.

    Args:
        target_probs: float32 [B, N + 1, V], the processed distribution after the last committed token and
            after each draft token.
        draft: Chains of up to N nodes with ``probs``.
        uniforms: Random numbers of the step.

    Raises:
        ValueError: The draft is a tree.
    """
    p = target_probs[:, :-1].gather(-1, draft.tokens[..., None])[..., 0].double()
    lengths = upload(draft.lengths, p.device)
    accepted = leading_run(uniforms.accept.to(p) * draft_mass(draft).double() < p, lengths)
    rows = torch.arange(len(accepted), device=accepted.device)
    weights = target_probs[rows, accepted]
    # computed for every row, because selecting the rejected ones would wait for a GPU
    rest = residual(weights, *drawn_from(draft, accepted.clamp(max=draft.nodes - 1)))
    weights = torch.where((accepted < lengths)[:, None], rest, weights)
    return Verification(
        chain_path(draft), accepted, draw(weights, uniforms.target.gather(1, accepted[:, None])[:, 0])
    )
