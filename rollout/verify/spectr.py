"""Lossless verification of drawn trees: siblings are k candidates of one optimal transport problem."""

from __future__ import annotations

import torch

from paceline.rollout.trees import DraftKind, DraftTree, child_table, draft_mass
from paceline.rollout.verify.outcome import Uniforms, Verification, drawn_from
from paceline.rollout.verify.recursive import descend
from paceline.rollout.verify.verifier import verifier

_BISECTIONS = 40  # narrow the interval [1, k] of ρ to about 1e-12 of its width


@verifier("spectr", covers=(DraftKind.WITH_REPLACEMENT,))
def verify_spectr(target_probs: torch.Tensor, draft: DraftTree, uniforms: Uniforms) -> Verification:
    """Verifies trees by k-sequential selection (K-SEQ) among the children of each node.

    Sun et al., "SpecTr", arXiv 2310.15141, Algorithm 2.

    Theorem (Sun et al., theorem 2). Let x_1 … x_k be drawn independently from q, and for ρ in [1, k] let β =
    Σ_x min(q(x), p(x)/ρ). Accept the first x_i whose uniform is below p(x_i)/(ρ q(x_i)). Some x_i is accepted
    with probability a = 1 − (1 − β)^k, and the accepted token then has distribution min(q, p/ρ)/β. If none is
    accepted, draw from (p − min(q, p/ρ) · a/β) / (1 − a), which is a distribution as long as a ≤ ρβ. So the
    committed token has distribution p. The smallest such ρ, where a = ρβ, is found by bisection; the
    acceptance rate is then within a factor 1 − 1/e of the best possible one.

    The candidates must be independent and their number k known before they are drawn: only then is (1 − β)^k
    the probability that all of them are rejected. Siblings drawn without replacement satisfy neither, and
    would give the committed token another distribution.

    Args:
        target_probs: float32 [B, N + 1, V], the processed distribution after the last committed token and
            after each node.
        draft: Trees of up to N nodes with ``probs``, whose siblings are drawn with replacement.
        uniforms: Random numbers of the step.

    Raises:
        ValueError: The siblings were drawn in another way.
    """
    mass = draft_mass(draft).double()
    table = child_table(draft)
    rows = torch.arange(len(mass), device=mass.device)

    def siblings(
        weights: torch.Tensor, node: torch.Tensor, alive: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        children = table[rows, node + 1]
        count = (children >= 0).sum(-1)
        q, ids = drawn_from(draft, children[:, 0].clamp(min=0))
        p_drafted = weights.double() if ids is None else weights.gather(-1, ids.expand_as(q)).double()
        rho, accept = select_rho(p_drafted, q.double(), count.clamp(min=1))
        moved = torch.full_like(node, -1)
        for child in children.T:
            at = child.clamp(min=0)
            p = weights.gather(-1, draft.tokens[rows, at, None])[:, 0].double()
            keep = (
                alive
                & (moved < 0)
                & (child >= 0)
                & (uniforms.accept[rows, at].to(p) * rho * mass[rows, at] < p)
            )
            moved = torch.where(keep, child, moved)
        shared = torch.minimum(q.double(), p_drafted / rho[:, None])
        accepted = shared * (accept / shared.sum(-1).clamp(min=1e-300))[:, None]
        rest = (p_drafted - accepted).clamp_(min=0).to(weights)
        rest = rest if ids is None else weights.scatter(-1, ids.expand_as(q), rest)
        rejected = alive & (moved < 0) & (count > 0) & (rest.sum(-1) > 0)
        return moved, torch.where(rejected[:, None], rest, weights)

    return descend(target_probs, draft, uniforms, siblings)


def select_rho(p: torch.Tensor, q: torch.Tensor, count: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Finds the division factor ρ of K-SEQ and the probability that it accepts one of the candidates.

    Args:
        p: float64 [B, W], the target's probabilities of the drafter's tokens.
        q: float64 [B, W], the drafter's probabilities.
        count: int64 [B], number of candidates k ≥ 1.

    Returns:
        ρ and the acceptance probability, float64 [B] each.
    """
    low, high = torch.ones_like(p[:, 0]), count.double()
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        beta = torch.minimum(q, p / middle[:, None]).sum(-1)
        valid = 1 - (1 - beta).pow(count) <= middle * beta
        low, high = torch.where(valid, low, middle), torch.where(valid, middle, high)
    beta = torch.minimum(q, p / high[:, None]).sum(-1)
    return high, 1 - (1 - beta).pow(count)
