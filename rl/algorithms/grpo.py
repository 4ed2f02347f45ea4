"""Group Relative Policy Optimization and its descendants: Dr. GRPO, DAPO, GSPO.

DeepSeekMath (arXiv 2402.03300), section 4.1, equation 3 for the objective. Token-level normalisation and the
separate upper clip are DAPO's (arXiv 2503.14476), sections 3.1 and 3.3.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch

Aggregate = Literal["token", "sequence", "constant"]


def group_advantages(rewards: torch.Tensor, group_size: int, scale_by_std: bool = True) -> torch.Tensor:
    """How much better each sample is than its group: (r − mean) / std, the std over the group's samples (n −
    1).

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


def token_weights(lengths: torch.Tensor, aggregate: Aggregate, longest: int) -> torch.Tensor:
    """What a token of each sample weighs in the batch's loss, up to a division that all samples share
    (`weight_total`).

    ``token``: every token alike (DAPO, section 3.3). ``sequence``: every sample alike, 1 / |o_i| a token
        (GRPO, equation 3).
    ``constant``: 1 / the longest completion there may be, so that a token's weight depends neither on its
        sample's length nor on
    others' (Dr. GRPO, arXiv 2503.20783).

    Args:
        lengths: int64 [S], tokens of each sample, at least 1.
        aggregate: Which.
        longest: Most tokens of a completion.

    Returns:
        float32 [S].
    """
    if aggregate == "token":
        return torch.ones(len(lengths))
    if aggregate == "sequence":
        return 1 / lengths.float()
    return torch.full((len(lengths),), 1 / longest)


def weight_total(lengths: torch.Tensor, aggregate: Aggregate) -> float:
    """What the weighted losses' sum is divided by, once it is summed over ranks: tokens, or samples."""
    return float(lengths.sum()) if aggregate == "token" else float(len(lengths))


def mastered_tokens(logprobs: torch.Tensor, advantages: torch.Tensor, probability: float) -> torch.Tensor:
    """Well-mastered positive tokens (UloRL, Du et al., arXiv 2507.19766, section 3.3): tokens of positive
    advantage that the policy already says with at least ``probability``. Training on them sharpens what is
    sharp; left out while entropy is below its target, they let it recover.

    Args:
        logprobs: float32 [M], of the policy that the update started from.
        advantages: float32 [M].
        probability: In (0, 1).

    Returns:
        bool [M].
    """
    return (advantages > 0) & (logprobs >= math.log(probability))


@dataclass(frozen=True, slots=True)
class TokenLoss:
    """Loss of each token, with what is worth logging.

    Attributes:
        loss: float32 [M].
        clipped: bool [M], where the clip took the gradient away.
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
    """Clipped surrogate: −min(ρA, clip(ρ, 1 − clip_low, 1 + clip_high) A), with ρ = exp(logprob − old) of
    each token, or, with ``owner``, exp of the mean of a sequence's (GSPO, Zheng et al., arXiv 2507.18071,
    equation 7).

    Args:
        logprobs: float32 [M], differentiable, of the policy now.
        old_logprobs: float32 [M], of the policy that the update started from.
        advantages: float32 [M], of each token.
        clip_low, clip_high: Width of the trust region below and above 1.
        owner: int64 [M], sequence of each token; all of a sequence's tokens must be there.
    """
    difference = logprobs - old_logprobs
    if owner is not None:
        count = int(owner.max()) + 1
        lengths = torch.bincount(owner, minlength=count).to(difference)
        difference = (difference.new_zeros(count).index_add(0, owner, difference) / lengths.clamp(min=1))[
            owner
        ]
    ratio = torch.exp(difference)
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    return TokenLoss(-torch.minimum(unclipped, clipped), (clipped < unclipped).detach())
