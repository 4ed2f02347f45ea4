"""Lossless verification of drafts that are a function of what is committed, at any temperature."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rollout.trees.chain import DraftTree


@dataclass(frozen=True, slots=True)
class Verification:
    """Outcome for each row.

    Attributes:
        accepted: int64 [B], how many leading draft tokens are kept.
        next_token: int64 [B], the token that follows them.
    """

    accepted: torch.Tensor
    next_token: torch.Tensor


def verify_deterministic(drawn: torch.Tensor, draft: DraftTree) -> Verification:
    """Keeps the draft while it equals what the target itself draws.

    Theorem (Leviathan et al., arXiv 2211.17192, Algorithm 1 with q = δ_x). Let y be drawn from the target's distribution p at
    a node. Keep the draft token x exactly when y = x: it is kept with probability p(x) = min(1, p(x)/q(x)), and given y ≠ x the
    token y has distribution p without x, which is the residual max(0, p − q) normalised. So the committed token has
    distribution p. It is moreover *the token that plain decoding draws with the same random number*: by induction the
    committed tokens are those of plain decoding with the same seed, not only equal in law. At temperature 0, y is the argmax,
    and they are those of greedy decoding.

    Args:
        drawn: int64 [B, N + 1], the target's draw after the root and after each draft token.
        draft: A chain of N nodes; its ``probs`` must be None.
    """
    accepted = leading_run(drawn[:, :-1] == draft.tokens, draft.lengths.to(drawn.device))
    return Verification(accepted, drawn.gather(1, accepted[:, None])[:, 0])


def leading_run(kept: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
    """Length of each row's leading run of True within its first ``lengths`` entries. bool [B, N], int64 [B] → int64 [B]."""
    inside = torch.arange(kept.shape[1], device=kept.device) < lengths[:, None]
    return (kept & inside).long().cumprod(-1).sum(-1)
