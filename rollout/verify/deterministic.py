"""Lossless verification, at any temperature, of drafts that are a function of the committed tokens."""

from __future__ import annotations

import torch

from paceline.rollout.trees import DraftKind, DraftTree, child_table
from paceline.rollout.verify.outcome import Verification, chain_path, leading_run


def verify_deterministic(drawn: torch.Tensor, draft: DraftTree) -> Verification:
    """Walks down the tree as long as the token that the target itself draws is among the children.

    Theorem (Leviathan et al., arXiv 2211.17192, Algorithm 1 with q = δ_x, for each child in turn). Let y be
    drawn from the target's distribution p at a node with children S. Descend to the child y if y ∈ S, which
    has probability p(S). Either way y is the committed token, so it has distribution p. No verifier accepts
    with a probability above p(S) when S is fixed, because an accepted token lies in S. Moreover y is *the
    token that plain decoding draws with the same random number*: by induction the committed tokens are those
    of plain decoding with the same seed, not only equal in distribution. At temperature 0, y is the argmax,
    and the tokens are those of greedy decoding (Stern et al., arXiv 1811.03115, section 3).

    Args:
        drawn: int64 [B, N + 1], the target's draw after the last committed token and after each node; nodes
            of one depth share their random number.
        draft: A chain or tree of N nodes, of kind FIXED. Among equal siblings the first counts.

    Raises:
        ValueError: The draft was drawn.
    """
    if draft.kind is not DraftKind.FIXED:
        raise ValueError(
            f"verify_deterministic is for fixed drafts, but this draft is {draft.kind}: use one of VERIFIERS"
        )
    if draft.parents is None:
        accepted = leading_run(drawn[:, :-1] == draft.tokens, draft.lengths)
        return Verification(chain_path(draft), accepted, drawn.gather(1, accepted[:, None])[:, 0])
    table = child_table(draft)
    rows = torch.arange(len(drawn), device=drawn.device)
    node, alive = torch.full_like(rows, -1), torch.ones_like(rows, dtype=torch.bool)
    accepted, path = torch.zeros_like(rows), torch.zeros_like(draft.tokens)
    for level in range(draft.nodes):
        children = table[rows, node + 1]
        hit = (children >= 0) & (draft.tokens.gather(1, children.clamp(min=0)) == drawn[rows, node + 1, None])
        alive = alive & hit.any(-1)
        first = children.gather(1, hit.long().argmax(-1, keepdim=True))[:, 0]
        node = torch.where(alive, first, node)
        path[:, level] = node
        accepted = accepted + alive
        if drawn.device.type == "cpu" and not bool(alive.any()):
            break
    return Verification(path, accepted, drawn[rows, node + 1])
