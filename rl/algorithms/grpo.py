"""Group Relative Policy Optimization and its descendants: Dr. GRPO, DAPO, GSPO.

The objective is equation 3 of DeepSeekMath (arXiv 2402.03300), section 4.1. Token-level normalisation and the
separate upper clip are from DAPO (arXiv 2503.14476), sections 3.3 and 3.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

Aggregate = Literal["token", "sequence", "constant"]


def group_advantages(rewards: torch.Tensor, group_size: int, scale_by_std: bool = True) -> torch.Tensor:
    """Computes (r − mean) / std of each sample within its group, with the sample standard deviation (n − 1).

    If all samples of a group have the same reward, their advantages are exactly 0.

    Args:
        rewards: float [groups * group_size], the samples of a group adjacent.
        group_size: Number of samples of a group, at least 2.
        scale_by_std: Whether to divide by the standard deviation; Dr. GRPO (arXiv 2503.20783) does not.

    Returns:
        float32 [groups * group_size].
    """
    grouped = rewards.float().view(-1, group_size)
    centred = grouped - grouped.mean(dim=1, keepdim=True)
    if not scale_by_std:
        return centred.flatten()
    std = grouped.std(dim=1, keepdim=True)
    return torch.where(std > 1e-6, centred / std.clamp(min=1e-6), torch.zeros_like(centred)).flatten()


def token_weights(lengths: torch.Tensor, aggregate: Aggregate, longest: int) -> torch.Tensor:
    """Returns the loss weight of a token of each sample, up to a shared divisor (`weight_total`).

    ``token`` weights all tokens equally (DAPO, section 3.3). ``sequence`` weights all samples equally, with
    1 / |o_i| per token (GRPO, equation 3). ``constant`` is 1 / the maximum completion length, so that a
    token's weight depends neither on its sample's length nor on those of others (Dr. GRPO, arXiv 2503.20783).

    Args:
        lengths: int64 [S], number of tokens of each sample, at least 1.
        aggregate: ``token``, ``sequence`` or ``constant``.
        longest: Maximum number of tokens of a completion.

    Returns:
        float32 [S].
    """
    if aggregate == "token":
        return torch.ones(len(lengths))
    if aggregate == "sequence":
        return 1 / lengths.float()
    return torch.full((len(lengths),), 1 / longest)


def weight_total(lengths: torch.Tensor, aggregate: Aggregate) -> float:
    """Returns this rank's part of the divisor of the weighted loss: its number of tokens, or of samples.

    The divisor is the sum over ranks.
    """
    return float(lengths.sum()) if aggregate == "token" else float(len(lengths))


def mastered_tokens(logprobs: torch.Tensor, advantages: torch.Tensor, probability: float) -> torch.Tensor:
    """Returns which tokens are well-mastered positive tokens.

    These are tokens of positive advantage to which the policy already assigns at least ``probability``.
    Training on them sharpens the distribution further; leaving them out while entropy is below its target
    lets entropy recover. Source: UloRL (Du et al., arXiv 2507.19766), section 3.3.

    Args:
        logprobs: float32 [M], log-probs under the policy that the update started from.
        advantages: float32 [M], advantage of each token.
        probability: Threshold in (0, 1).

    Returns:
        bool [M].
    """
    return (advantages > 0) & (logprobs >= math.log(probability))


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """The loss of each token, and where it was clipped.

    Attributes:
        loss: float32 [M].
        clipped: bool [M], where clipping removed the gradient.
    """

    loss: torch.Tensor
    clipped: torch.Tensor


def policy_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    owner: torch.Tensor | None = None,
) -> TokenLoss:
    """Computes the clipped surrogate −min(ρA, clip(ρ, 1 − clip_low, 1 + clip_high) A).

    ρ = exp(logprob − old) for each token. With ``owner``, ρ is the exponential of the mean difference over a
    token's sequence (GSPO, Zheng et al., arXiv 2507.18071, equation 7).

    Args:
        logprobs: float32 [M], log-probs under the current policy, differentiable.
        old_logprobs: float32 [M], log-probs under the policy that the update started from.
        advantages: float32 [M], advantage of each token.
        clip_low: Distance below 1 at which ratios are clipped.
        clip_high: Distance above 1 at which ratios are clipped.
        owner: int64 [M], index of each token's sequence; all tokens of a sequence must be present. None takes
            the ratio of each token.
    """
    difference = logprobs - old_logprobs
    if owner is not None:
        count = int(owner.max()) + 1
        lengths = torch.bincount(owner, minlength=count).to(difference)
        sums = difference.new_zeros(count).index_add(0, owner, difference)
        difference = (sums / lengths.clamp(min=1))[owner]
    ratio = torch.exp(difference)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return TokenLoss(-torch.minimum(unclipped, clipped), (clipped < unclipped).detach())
