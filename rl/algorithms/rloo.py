"""REINFORCE Leave-One-Out (Ahmadian et al., "Back to Basics", arXiv 2402.14740)."""

from __future__ import annotations

import torch


def leave_one_out_advantages(rewards: torch.Tensor, group_size: int) -> torch.Tensor:
    """Each sample's reward less the mean of its group's other samples: a baseline that does not depend on the
    sample itself.

    Equal to the centred rewards times n / (n − 1).

    Args:
        rewards: float [groups * group_size], the samples of a group adjacent.
        group_size: At least 2.

    Returns:
        float32 [groups * group_size].
    """
    grouped = rewards.float().view(-1, group_size)
    others = (grouped.sum(dim=1, keepdim=True) - grouped) / (group_size - 1)
    return (grouped - others).flatten()
