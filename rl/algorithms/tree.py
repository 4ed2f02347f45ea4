"""Advantages of samples with shared prefixes: TreePO (Li et al., arXiv 2508.17445, section 2.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def tree_advantages(
    rewards: torch.Tensor, paths: Sequence[Sequence[int]], group_size: int, scale_by_std: bool = True
) -> torch.Tensor:
    """Computes how much better each sample is than the samples with which it shares a prefix.

    It is the average of r − mean over the group and over each smaller set of samples that share one more
    segment, divided by the standard deviation of these averages in the group.

    The gradient of a shared segment is the sum over its samples. In this sum, the differences from the mean
    of the segment's own set cancel, so a segment is credited with how its whole subtree compares with its
    siblings: the advantage is one of segments, although each sample has a single number.

    Args:
        rewards: float [groups * group_size], the samples of a group adjacent.
        paths: Segments of each sample by number, from the root; the numbers are local to a group.
        group_size: Number of samples of a group, at least 2.
        scale_by_std: Whether to divide by the standard deviation.

    Returns:
        float32 [groups * group_size]; 0 in a group whose samples all have the same reward.
    """
    advantages = torch.zeros(len(rewards))
    for start in range(0, len(rewards), group_size):
        members = range(start, start + group_size)
        sharing: dict[tuple[int, ...], list[int]] = {}
        for i in members:
            for depth in range(len(paths[i])):
                sharing.setdefault(tuple(paths[i][:depth]), []).append(i)
        for i in members:
            sets = [sharing[tuple(paths[i][:depth])] for depth in range(len(paths[i]))]
            sets = [s for depth, s in enumerate(sets) if depth == 0 or len(s) > 1]
            advantages[i] = sum(float(rewards[i]) - float(rewards[s].float().mean()) for s in sets) / len(
                sets
            )
        own = advantages[start : start + group_size]
        if scale_by_std and float(own.std()) > 1e-6:
            advantages[start : start + group_size] = own / own.std()
    return advantages
