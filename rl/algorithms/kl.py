"""Estimators of the KL divergence to the reference policy, and the adaptive KL coefficient."""

from __future__ import annotations

from typing import Literal

import torch

KlEstimate = Literal["k1", "k2", "k3"]


def estimate_kl(logprobs: torch.Tensor, reference_logprobs: torch.Tensor, kind: KlEstimate) -> torch.Tensor:
    """Estimates KL(policy ‖ reference) at each token that the policy sampled, with d = logprob − reference.

    k1 = d is unbiased but often negative. k2 = d²/2 is biased, but its gradient is that of the KL. k3 =
    e^{−d} − 1 + d is unbiased and never negative (Schulman, "Approximating KL divergence", 2020; k3 is
    equation 4 of DeepSeekMath, arXiv 2402.03300).

    Args:
        logprobs: float32 [M], log-probs under the policy, in nats.
        reference_logprobs: float32 [M], log-probs under the reference, in nats.
        kind: ``k1``, ``k2`` or ``k3``.

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
    """The KL coefficient β, fixed or adapted to a target.

    After each step, β ← β (1 + 0.1 · clip(KL / target − 1, −0.2, 0.2)) (Ziegler et al., arXiv 1909.08593,
    section 2.2).

    Args:
        value: Initial β.
        target: KL per token to adapt to, in nats; None keeps β fixed.

    Attributes:
        value: Current β.
    """

    def __init__(self, value: float, target: float | None = None) -> None:
        self.value, self._target = value, target

    def observe(self, kl: float) -> None:
        """Adapts β to a step's mean KL per token, in nats."""
        if self._target is not None:
            self.value *= 1 + 0.1 * min(max(kl / self._target - 1, -0.2), 0.2)
