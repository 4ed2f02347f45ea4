"""Budget relative policy optimization (BRPO).

Source: AnytimeReasoner (Qi et al., arXiv 2505.13438), section 3, and its reference code.
"""

from __future__ import annotations

import torch


def brpo_advantages(scores: torch.Tensor, weights: torch.Tensor, discount: float = 2.0) -> torch.Tensor:
    """Computes the advantage of each part of a thought between two budgets.

    The return of the thought up to budget s is the weighted sum of the scores at this and all later budgets.
    The baseline has two parts: V₁, the value of the same thought so far (the mean of its scores at earlier
    budgets, where nearer budgets weigh more), and V₂, the mean return of the group's thoughts. The later the
    budget, the more the first counts: V = (s V₁ + (S − s) V₂) / S. V₁ depends on earlier tokens alone, so it
    adds no bias; V₂ contains the sample's own return as one of G, as in GRPO.

    Args:
        scores: float [G, S], score of each sample of a group at each budget, in ascending order of budgets.
        weights: float [S], how often each budget is requested; normalised here.
        discount: Factor by which a budget weighs more than the one before it in V₁.

    Returns:
        float32 [G, S].
    """
    scores, weights = scores.float(), weights.float() / weights.sum()
    groups, levels = scores.shape
    advantages = torch.zeros(groups, levels)
    for s in range(levels):
        returns = (scores[:, s:] * weights[s:]).sum(1)
        own_value = torch.zeros(groups)
        if s:
            nearness = discount ** torch.arange(s, dtype=torch.float32)
            own_value = (scores[:, :s] * nearness).sum(1) / nearness.sum() * weights[s:].sum()
        advantages[:, s] = returns - (s * own_value + (levels - s) * returns.mean()) / levels
    return advantages
