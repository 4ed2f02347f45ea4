"""Proximal Policy Optimization's side of the critic (Schulman et al., arXiv 1707.06347; advantages: arXiv
1506.02438).
"""

from __future__ import annotations

import torch


def generalised_advantages(
    rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} − V_t (generalised advantage estimation, equations
    14 and 16), and the returns A_t + V_t. The completion ends after the last token: V is 0 there.

    Args:
        rewards: float32 [L], of each token.
        values: float32 [L], the critic's before each token.
        gamma, lam: Discounts of rewards and of what the critic adds.

    Returns:
        Advantages and returns, float32 [L].
    """
    following = torch.cat([values[1:], values.new_zeros(1)])
    surprise = rewards + gamma * following - values
    advantages = torch.empty_like(values)
    running = values.new_zeros(())
    for t in range(len(values) - 1, -1, -1):
        running = surprise[t] + gamma * lam * running
        advantages[t] = running
    return advantages, advantages + values


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float | None
) -> torch.Tensor:
    """Half the squared error, of the value or of the value clipped to ``old ± clip``, whichever is larger.

    Args:
        values: float32 [M], differentiable.
        old_values: float32 [M], of the critic before the update.
        returns: float32 [M].
        clip: Width; None does not clip.

    Returns:
        float32 [M].
    """
    error = (values - returns).square()
    if clip is not None:
        held = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (held - returns).square())
    return error / 2
