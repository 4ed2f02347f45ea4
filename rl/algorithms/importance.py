"""The engine draws tokens under slightly other numbers than the trainer computes: how much, and what to do
about it.
"""

from __future__ import annotations

from typing import Literal

import torch

ImportanceLevel = Literal["none", "token", "sequence"]


def importance_weights(
    trainer: torch.Tensor, engine: torch.Tensor, owner: torch.Tensor, level: ImportanceLevel, cap: float
) -> torch.Tensor:
    """min(π_trainer / π_engine, cap): truncated importance sampling (Ionides 2008), as Yao et al., "Your
    Efficient RL Framework Secretly Brings You Off-Policy RL Training" (2025), apply it between a trainer and
    its inference engine.

    Args:
        trainer, engine: float32 [M], log-probs of the drawn tokens under each, at the rollout's parameters.
        owner: int64 [M], sequence of each token.
        level: The ratio of each token, or of its whole sequence, or none: then every weight is 1.
        cap: C; small ratios stay small, so that the variance is bounded at the price of some bias.

    Returns:
        float32 [M], no gradient.
    """
    if level == "none":
        return torch.ones_like(engine)
    difference = (trainer - engine).detach()
    if level == "sequence":
        sums = difference.new_zeros(int(owner.max()) + 1).index_add_(0, owner, difference)
        difference = sums[owner]
    return torch.exp(difference).clamp(max=cap)


def effective_share(weights_sum: float, squares_sum: float, count: float) -> float:
    """(Σ w)² / (n Σ w²): the share of the tokens that a sample of equal weights would need for the same
    variance (Kish's effective sample size).
    """
    return weights_sum**2 / (count * squares_sum) if squares_sum > 0 and count > 0 else 1.0
