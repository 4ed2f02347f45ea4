"""Weights of drafters that are trained side by side, by how they have lately done."""

from __future__ import annotations

import math
from collections.abc import Sequence

_RATE = 8.0  # a tenth of a token of acceptance length more is e^0.8 = 2.2 times the weight
_SHARE = 0.05


def tracking_weights(
    weights: Sequence[float], lengths: Sequence[float], rate: float = _RATE, share: float = _SHARE
) -> list[float]:
    """Hedge with a fixed share: w_i ← (1 − α) w_i e^{η g_i} / Σ_j w_j e^{η g_j} + α/N (Herbster and Warmuth,
    "Tracking the Best Expert", 1998).

    The share α keeps every weight above α/N, so that another drafter comes to the front within a few
    judgements once it does
    better: what is best changes as the policy moves.

    Args:
        weights: N, sum 1.
        lengths: Expected acceptance length g_i of each; what is not finite counts as none.
        rate: η, per token of acceptance length.
        share: α.

    Returns:
        N weights, sum 1.
    """
    gains = [length if math.isfinite(length) else 0.0 for length in lengths]
    most = max(gains)
    grown = [weight * math.exp(rate * (gain - most)) for weight, gain in zip(weights, gains, strict=True)]
    total = sum(grown)
    return [(1 - share) * weight / total + share / len(grown) for weight in grown]
