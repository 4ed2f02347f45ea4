"""Advantages and the critic's loss of Proximal Policy Optimization.

Sources: Schulman et al. (arXiv 1707.06347); generalised advantage estimation (arXiv 1506.02438).
"""

from __future__ import annotations

import torch


def generalised_advantages(
    rewards: torch.Tensor, values: torch.Tensor, gamma: float, lam: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes generalised advantage estimates and returns of one completion.

    A_t = Σ_l (γλ)^l δ_{t+l} with δ_t = r_t + γ V_{t+1} − V_t (arXiv 1506.02438, equations 14 and 16); the
    returns are A_t + V_t. The completion ends after its last token, where V is 0.

    Args:
        rewards: float32 [L], reward of each token.
        values: float32 [L], the critic's value before each token.
        gamma: Discount γ of rewards.
        lam: Discount λ of the estimates.

    Returns:
        Advantages and returns, float32 [L] each.
    """
    next_values = torch.cat([values[1:], values.new_zeros(1)])
    td_errors = rewards + gamma * next_values - values
    advantages = torch.empty_like(values)
    running = values.new_zeros(())
    for t in range(len(values) - 1, -1, -1):
        running = td_errors[t] + gamma * lam * running
        advantages[t] = running
    return advantages, advantages + values


def value_loss(
    values: torch.Tensor, old_values: torch.Tensor, returns: torch.Tensor, clip: float | None
) -> torch.Tensor:
    """Computes half the squared error of the value.

    With ``clip``, it is the larger of the errors of the value and of the value clipped to ``old ± clip``.

    Args:
        values: float32 [M], the critic's values, differentiable.
        old_values: float32 [M], values before the update.
        returns: float32 [M], targets.
        clip: Distance from the old value at which values are clipped; None does not clip.

    Returns:
        float32 [M].
    """
    error = (values - returns).square()
    if clip is not None:
        clipped = old_values + (values - old_values).clamp(-clip, clip)
        error = torch.maximum(error, (clipped - returns).square())
    return error / 2
