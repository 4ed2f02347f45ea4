"""Budget relative policy optimization (AnytimeReasoner: Qi et al., arXiv 2505.13438, section 3, and its
reference code).
"""

from __future__ import annotations

import torch


def brpo_advantages(scores: torch.Tensor, weights: torch.Tensor, discount: float = 2.0) -> torch.Tensor:
    """Advantages of the stretches of thought between budgets.

    Thought up to budget s is worth what it leads to: its return is the weighted sum of the scores at this
        budget and all later
    ones. From it goes a baseline of two parts: what the same thought was worth before (the mean of its scores
        at earlier budgets,
    the nearest weighing most), and what the group's thoughts are worth on average; the later the budget, the
    more the first counts: V = (s V₁ + (S − s) V₂) / S. The first depends on earlier tokens alone, so it adds
        no bias; the second holds the sample's own
    return as one of G, as in GRPO.

    Args:
        scores: float [G, S], of each sample of a group at each budget, ascending.
        weights: float [S], how often each budget is asked for; normalised here.
        discount: How much more each nearer earlier budget weighs.

    Returns:
        float32 [G, S].
    """
    scores, weights = scores.float(), weights.float() / weights.sum()
    groups, levels = scores.shape
    found = torch.zeros(groups, levels)
    for s in range(levels):
        returns = (scores[:, s:] * weights[s:]).sum(1)
        before = torch.zeros(groups)
        if s:
            nearer = discount ** torch.arange(s, dtype=torch.float32)
            before = (scores[:, :s] * nearer).sum(1) / nearer.sum() * weights[s:].sum()
        found[:, s] = returns - (s * before + (levels - s) * returns.mean()) / levels
    return found
