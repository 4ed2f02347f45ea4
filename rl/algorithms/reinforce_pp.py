"""REINFORCE++ (Hu et al., arXiv 2501.03262).

It needs no critic and no groups: penalties are per token, and advantages are normalised over the batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def rewards_to_go(reward: float, penalties: torch.Tensor) -> torch.Tensor:
    """Returns the reward to go of each token: the sequence's reward minus the penalties from the token on.

    Args:
        reward: Reward of the sequence, given at its end.
        penalties: float32 [L], β times the KL of each token.

    Returns:
        float32 [L].
    """
    return reward - penalties.flip(0).cumsum(0).flip(0)


def normalise(
    values: Sequence[torch.Tensor], sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """Normalises values to mean 0 and standard deviation 1 over all tokens of all ranks.

    Args:
        values: float32 [L_i] for each of this rank's sequences.
        sum_over_ranks: Function that sums a tensor over ranks.

    Returns:
        float32 [L_i] each; zeros if all values are equal.
    """
    tokens = torch.cat([torch.zeros(0), *values]).double()
    count, value_sum = sum_over_ranks(
        torch.stack([torch.tensor(float(len(tokens)), dtype=torch.float64), tokens.sum()])
    ).tolist()
    mean = value_sum / max(count, 1.0)
    squares = float(sum_over_ranks((tokens - mean).square().sum()[None]))
    std = (squares / max(count, 1.0)) ** 0.5
    scale = 1 / std if std > 1e-6 else 0.0
    return [((value.double() - mean) * scale).float() for value in values]
