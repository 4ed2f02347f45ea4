"""Lossless verification of drawn trees: the siblings of a node are tried one after another."""

from __future__ import annotations

from collections.abc import Callable

import torch

from paceline.rollout.sampling import draw
from paceline.rollout.trees import DraftKind, DraftTree, child_table, draft_mass
from paceline.rollout.verify.outcome import Uniforms, Verification, drawn_from, residual
from paceline.rollout.verify.verifier import verifier

Siblings = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


@verifier(
    "recursive", covers=(DraftKind.WITH_REPLACEMENT, DraftKind.WITHOUT_REPLACEMENT, DraftKind.UNLABELLED)
)
def verify_recursive(target_probs: torch.Tensor, draft: DraftTree, uniforms: Uniforms) -> Verification:
    """Verifies trees by recursive rejection sampling over the children of each node.

    With replacement: Miao et al., "SpecInfer", arXiv 2305.09781, Algorithm 2 (MSS); Yang et al.,
    "Multi-Candidate Speculative Decoding", arXiv 2401.06706, Algorithm 1. Without replacement: Jeon et al.,
    "Recursive Speculative Decoding", arXiv 2402.14160, Algorithm 2 and theorem 3.1; Yang et al., section 3.2.

    Theorem. Let p_1 be the target's distribution at a node and x_i the i-th child, drawn from a distribution
    q_i that may depend on the children before it. Accept x_i with probability min(1, p_i(x_i)/q_i(x_i)), else
    continue with p_{i+1} ∝ max(0, p_i − q_i); after the last child, draw from what is left. By the theorem of
    chain verification, conditionally on everything drawn before, the token that results from (p_i, q_i,
    p_{i+1}) has distribution p_i; by backward induction over i, the committed one has distribution p_1.
    Independently drawn siblings have q_i = q. Siblings drawn without replacement (as Gumbel-top-k does) have
    q_i = q without the earlier ones, normalised. `DraftTree.probs` holds q_i itself, so that one function
    covers both, and also a tree that does not state its kind.

    How many children a node has may depend on everything drawn before each of them, but not on the value of
    the child itself.

    Args:
        target_probs: float32 [B, N + 1, V], the processed distribution after the last committed token and
            after each node.
        draft: Trees of up to N nodes with ``probs``.
        uniforms: Random numbers of the step.
    """
    mass = draft_mass(draft).double()
    table = child_table(draft)
    rows = torch.arange(len(mass), device=mass.device)

    def siblings(
        weights: torch.Tensor, node: torch.Tensor, alive: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        moved = torch.full_like(node, -1)
        for child in table[rows, node + 1].T:
            at = child.clamp(min=0)
            here = alive & (moved < 0) & (child >= 0)
            p = weights.gather(-1, draft.tokens[rows, at, None])[:, 0].double()
            keep = here & (uniforms.accept[rows, at].to(p) * mass[rows, at] < p)
            moved = torch.where(keep, child, moved)
            weights = torch.where((here & ~keep)[:, None], residual(weights, *drawn_from(draft, at)), weights)
        return moved, weights

    return descend(target_probs, draft, uniforms, siblings)


def descend(
    target_probs: torch.Tensor, draft: DraftTree, uniforms: Uniforms, siblings: Siblings
) -> Verification:
    """Descends from the last committed token while a child is accepted, then draws the next token.

    Args:
        target_probs: float32 [B, N + 1, V], as for `verify_recursive`.
        draft: Trees of up to N nodes.
        uniforms: Random numbers of the step; this function uses ``target``.
        siblings: Chooses among the children of a node: (distribution [B, V], node [B], rows still descending
            [B]) → the accepted child of each row or ``-1``, and the distribution that the next token is drawn
            from where no child was accepted.
    """
    rows = torch.arange(len(draft.tokens), device=draft.tokens.device)
    node, alive = torch.full_like(rows, -1), torch.ones_like(rows, dtype=torch.bool)
    accepted, path = torch.zeros_like(rows), torch.zeros_like(draft.tokens)
    weights = target_probs[:, 0]
    for level in range(draft.nodes + 1):
        weights = torch.where(alive[:, None], target_probs[rows, node + 1], weights)
        moved, weights = siblings(weights, node, alive)
        alive = alive & (moved >= 0)
        if level == draft.nodes or (alive.device.type == "cpu" and not bool(alive.any())):
            break
        node = torch.where(alive, moved, node)
        path[:, level] = node
        accepted = accepted + alive
    return Verification(path, accepted, draw(weights, uniforms.target.gather(1, accepted[:, None])[:, 0]))
