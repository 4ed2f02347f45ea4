"""REINFORCE Leave-One-Out, RLOO (Ahmadian et al., "Back to Basics", arXiv 2402.14740)."""

from __future__ import annotations

import torch


def leave_one_out_advantages(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """Computes each sample's reward minus the mean of its group's other samples.

    This baseline does not depend on the sample itself. The result equals the centred rewards times n / (n −
    1).

    Args:
        rewards: float [groups * group_size], the samples of a group adjacent.
        group_size: Number of samples of a group, at least 2.

    Returns:
        float32 [groups * group_size].
    """
    grouped = rewards.float().view(-1, group_size)
    others = (grouped.sum(dim=1, keepdim=True) - grouped) / (group_size - 1)
    return (grouped - others).flatten()
