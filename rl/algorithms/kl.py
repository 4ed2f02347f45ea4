"""How far the policy has moved from its reference: estimates from samples, and a coefficient that keeps to a
target.
"""

from __future__ import annotations

from typing import Literal

import torch

KlEstimate = Literal["k1", "k2", "k3"]


def estimate_kl(logprobs: torch.Tensor, reference_logprobs: torch.Tensor, kind: KlEstimate) -> torch.Tensor:
    """Estimates of KL(policy ‖ reference) from tokens that the policy drew, with d = logprob − reference.

    k1 = d, without bias, often negative; k2 = d²/2, whose gradient is that of the KL though its value is not;
    k3 = e^{−d} − 1 + d, without bias and never negative (Schulman, "Approximating KL divergence", 2020; k3 is
    equation 4 of DeepSeekMath, arXiv 2402.03300).

    Args:
        logprobs, reference_logprobs: float32 [M], nats.
        kind: Which.

    Returns:
        float32 [M].
    """
    distance = logprobs - reference_logprobs
    if kind == "k1":
        return distance
    if kind == "k2":
        return distance.square() / 2
    return torch.exp(-distance) - 1 + distance


class KlCoefficient:
    """β, fixed or adapted: β ← β (1 + 0.1 · clip(KL / target − 1, −0.2, 0.2)) after each step (Ziegler et
    al., arXiv 1909.08593, section 2.2).

    Args:
        value: The first β.
        target: KL of a token to keep to, in nats; None leaves β as it is.
    """

    def __init__(self, value: float, target: float | None = None) -> None:
        self.value, self._target = value, target

    def observe(self, kl: float) -> None:
        """A step's mean KL of a token."""
        if self._target is not None:
            self.value *= 1 + 0.1 * min(max(kl / self._target - 1, -0.2), 0.2)
