"""Policy losses by the name that ``update.ratio`` selects.

A new loss is a file beside this one with a function of `PolicyLoss`'s signature, and its line in
`POLICY_LOSSES`.
"""

from __future__ import annotations

from typing import Protocol

import torch

from paceline.rl.algorithms.grpo import TokenLoss, policy_loss


class PolicyLoss(Protocol):
    """A loss of each token of a packed micro-batch."""

    def __call__(
        self,
        logprobs: torch.Tensor,
        old_logprobs: torch.Tensor,
        advantages: torch.Tensor,
        *,
        owner: torch.Tensor,
        clip_low: float,
        clip_high: float,
    ) -> TokenLoss:
        """Computes the loss of each token.

        Args:
            logprobs: float32 [M], log-probs under the current policy, differentiable.
            old_logprobs: float32 [M], log-probs under the policy that the update started from.
            advantages: float32 [M], advantage of each token.
            owner: int64 [M], index of each token's sequence; a sequence is never split.
            clip_low: Distance below 1 at which ratios are clipped.
            clip_high: Distance above 1 at which ratios are clipped.
        """


def token_ratio_loss(
    logprobs: torch.Tensor,
    old_logprobs: torch.Tensor,
    advantages: torch.Tensor,
    *,
    owner: torch.Tensor,
    clip_low: float,
    clip_high: float,
) -> TokenLoss:
    """Computes the surrogate with the ratio of each token; see `policy_loss`."""
    return policy_loss(logprobs, old_logprobs, advantages, clip_low=clip_low, clip_high=clip_high)


POLICY_LOSSES: dict[str, PolicyLoss] = {
    "token": token_ratio_loss,
    "sequence": policy_loss,
}
