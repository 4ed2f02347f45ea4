"""REINFORCE++ (Hu et al., arXiv 2501.03262): no critic and no groups; a penalty at each token, normalised
over the whole batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch


def rewards_to_go(reward: float, penalties: torch.Tensor) -> torch.Tensor:
    """What each token still has before it: the sequence's reward, which comes at its end, less the penalties
    from there on.

    Args:
        reward: Of the sequence.
        penalties: float32 [L], β times the KL of each token.

    Returns:
        float32 [L].
    """
    return reward - penalties.flip(0).cumsum(0).flip(0)


def normalise(
    values: Sequence[torch.Tensor], total: Callable[[torch.Tensor], torch.Tensor]
) -> list[torch.Tensor]:
    """Mean 0 and standard deviation 1 over every token of every rank.

    Args:
        values: float32 [L_i], of this rank's sequences.
        total: Sums a tensor over ranks.

    Returns:
        float32 [L_i] each; zeros where all values are equal.
    """
    line = torch.cat([torch.zeros(0), *values]).double()
    count, first = total(
        torch.stack([torch.tensor(float(len(line)), dtype=torch.float64), line.sum()])
    ).tolist()
    mean = first / max(count, 1.0)
    squares = float(total((line - mean).square().sum()[None]))
    std = (squares / max(count, 1.0)) ** 0.5
    scale = 1 / std if std > 1e-6 else 0.0
    return [((value.double() - mean) * scale).float() for value in values]
