"""Advantages of samples that share beginnings: TreePO (Li et al., arXiv 2508.17445, section 2.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch


def tree_advantages(
    rewards: torch.Tensor, paths: Sequence[Sequence[int]], group_size: int, scale_by_std: bool = True
) -> torch.Tensor:
    """How much better each sample is than those it shares a beginning with: r − mean over the group and over
    each smaller set that shares one more segment, averaged, then divided by the standard deviation of these
    in the group.

    The gradient of a shared segment is the sum over the samples that have it. Below a junction the
    differences from its own mean cancel in that sum, so a segment is credited with how its whole subtree does
    among its siblings: the advantage is one of segments although each sample has a single number.

    Args:
        rewards: float [groups * group_size], the samples of a group adjacent.
        paths: Of each sample, its segments by number, the first one first; numbers are a group's own.
        group_size: At least 2.
        scale_by_std: Whether to divide.

    Returns:
        float32 [groups * group_size]; 0 in a group whose samples all have one reward.
    """
    found = torch.zeros(len(rewards))
    for start in range(0, len(rewards), group_size):
        members = range(start, start + group_size)
        sharing: dict[tuple[int, ...], list[int]] = {}
        for i in members:
            for depth in range(len(paths[i])):
                sharing.setdefault(tuple(paths[i][:depth]), []).append(i)
        for i in members:
            sets = [sharing[tuple(paths[i][:depth])] for depth in range(len(paths[i]))]
            sets = [s for depth, s in enumerate(sets) if depth == 0 or len(s) > 1]
            found[i] = sum(float(rewards[i]) - float(rewards[s].float().mean()) for s in sets) / len(sets)
        own = found[start : start + group_size]
        if scale_by_std and float(own.std()) > 1e-6:
            found[start : start + group_size] = own / own.std()
    return found
