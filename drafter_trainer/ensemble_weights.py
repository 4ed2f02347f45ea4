"""Weights of drafters trained side by side, by their recent acceptance lengths."""

from __future__ import annotations

import math
from collections.abc import Sequence

_LEARNING_RATE = 8.0  # 0.1 tokens more acceptance length multiply a weight by e^0.8 = 2.2
_FIXED_SHARE = 0.05


def tracking_weights(
    weights: Sequence[float],
    lengths: Sequence[float],
    rate: float = _LEARNING_RATE,
    share: float = _FIXED_SHARE,
) -> list[float]:
    """Updates ensemble weights by Hedge with a fixed share.

    w_i ← (1 − α) w_i e^{η g_i} / Σ_j w_j e^{η g_j} + α/N (Herbster and Warmuth, "Tracking the Best Expert",
    1998). The share α keeps every weight above α/N, so that another drafter takes the lead within a few
    evaluations once it does better: which one is best changes as the policy moves.

    Args:
        weights: N weights that sum to 1.
        lengths: Expected acceptance length g_i of each drafter; values that are not finite count as 0.
        rate: Learning rate η, per token of acceptance length.
        share: Fixed share α.

    Returns:
        N weights that sum to 1.
    """
    gains = [length if math.isfinite(length) else 0.0 for length in lengths]
    largest = max(gains)
    grown = [weight * math.exp(rate * (gain - largest)) for weight, gain in zip(weights, gains, strict=True)]
    total = sum(grown)
    return [(1 - share) * weight / total + share / len(grown) for weight in grown]
