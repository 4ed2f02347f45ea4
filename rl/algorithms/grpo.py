"""Group Relative Policy Optimization.

DeepSeekMath (arXiv 2402.03300), section 4.1: equation 3 for the objective, equation 4 for the KL estimator. Token-level
normalisation and the separate upper clip are DAPO's (arXiv 2503.14476), sections 3.1 and 3.3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch


def group_advantages(rewards: torch.Tensor, group_size: int, scale_by_std: bool = True) -> torch.Tensor:
    """How much better each sample is than its group: (r − mean) / std, the std over the group's samples (n − 1).

    A group whose samples all have one reward says nothing: its advantages are exactly 0.

    Args:
        rewards: float [groups * group_size], the samples of a group adjacent.
        group_size: At least 2.
        scale_by_std: False leaves out the division, as Dr. GRPO (arXiv 2503.20783) does.

    Returns:
        float32 [groups * group_size].
    """
    grouped = rewards.float().view(-1, group_size)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    if not scale_by_std:
        return centred.flatten()
    std = grouped.std(dim=1, keepdim=True)
    return torch.where(std > 1e-6, centred / std.clamp(min=1e-6), torch.zeros_like(centred)).flatten()


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Loss of each token, with what is worth logging.

    Attributes:
        loss: float32 [M], to be summed and divided by the global token count.
        clipped: bool [M], where the clip took the gradient away.
        kl: float32 [M], the estimate of KL(policy ‖ reference), no gradient; zero without a reference.
    """

    loss: torch.Tensor
    clipped: torch.Tensor
    kl: torch.Tensor


def grpo_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    reference_logprobs: torch.Tensor | None = None,
    kl_coef: float = 0.0,
) -> TokenLoss:
    """Clipped surrogate: −min(ρA, clip(ρ, 1 − clip_low, 1 + clip_high) A) + kl_coef · (e^d − d − 1),
    with ρ = exp(logprob − old) and d = reference − logprob.

    Args:
        logprobs: float32 [M], differentiable, of the policy now.
        old_logprobs: float32 [M], of the policy that the update started from.
        advantages: float32 [M], of the sequence each token belongs to.
        clip_low, clip_high: Width of the trust region below and above 1.
        reference_logprobs: float32 [M], of the reference policy, or None.
        kl_coef: Weight of the KL penalty.
    """
    ratio = torch.exp(logprobs - old_logprobs)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    loss = -torch.minimum(unclipped, clipped)
    kl = torch.zeros_like(loss)
    if reference_logprobs is not None:
        distance = reference_logprobs - logprobs
        penalty = torch.exp(distance) - distance - 1
        loss = loss + kl_coef * penalty
        kl = penalty.detach()
    return TokenLoss(loss, (clipped < unclipped).detach(), kl)
