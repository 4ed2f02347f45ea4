"""Importance weights that correct the training–inference mismatch between trainer and engine."""

from __future__ import annotations

from typing import Literal

import torch

ImportanceLevel = Literal["none", "token", "sequence"]


def importance_weights(
    trainer: torch.Tensor, engine: torch.Tensor, owner: torch.Tensor, level: ImportanceLevel, cap: float
) -> torch.Tensor:
    """Returns truncated importance weights min(π_trainer / π_engine, cap).

    Truncated importance sampling is due to Ionides (2008). Yao et al., "Your Efficient RL Framework Secretly
    Brings You Off-Policy RL Training" (2025), apply it between a trainer and its inference engine.

    Args:
        trainer: float32 [M], the trainer's log-probs of the sampled tokens, at the rollout's parameters.
        engine: float32 [M], the engine's log-probs of them.
        owner: int64 [M], index of each token's sequence.
        level: ``token`` takes the ratio of each token, ``sequence`` that of its whole sequence, and ``none``
            returns weights of 1.
        cap: Largest weight. Small ratios are not raised, so the variance is bounded at the cost of some bias.

    Returns:
        float32 [M], without gradient.
    """
    if level == "none":
        return torch.ones_like(engine)
    difference = (trainer - engine).detach()
    if level == "sequence":
        sums = difference.new_zeros(int(owner.max()) + 1).index_add_(0, owner, difference)
        difference = sums[owner]
    return torch.exp(difference).clamp(max=cap)


def effective_share(weights_sum: float, squares_sum: float, count: float) -> float:
    """Returns the effective sample size as a share of the tokens, (Σ w)² / (n Σ w²).

    It is the share of equally weighted tokens that would have the same variance (Kish).

    Args:
        weights_sum: Sum of the weights.
        squares_sum: Sum of their squares.
        count: Number of weights n.
    """
    return weights_sum**2 / (count * squares_sum) if squares_sum > 0 and count > 0 else 1.0
