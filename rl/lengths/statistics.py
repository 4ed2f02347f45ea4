"""Statistics of observed lengths, and detection of degenerate loops.

Quantiles are reported by prompt, as CASTILLO (arXiv 2505.16881) does.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

QUANTILES = (0.25, 0.5, 0.75, 0.99)


def is_loop(token_ids: Sequence[int], repeats: int = 4, least: int = 32, longest_period: int = 64) -> bool:
    """Returns whether a completion ends in a degenerate loop, a sequence of tokens repeated until the end.

    Args:
        token_ids: Token ids of the completion.
        repeats: Minimum number of consecutive repeats at the end.
        least: Minimum number of tokens of all repeats together.
        longest_period: Maximum number of tokens of the repeated sequence.
    """
    ids = np.asarray(token_ids)
    for period in range(1, min(longest_period, len(ids) // repeats) + 1):
        span = max(repeats * period, least)
        tail = ids[-span:]
        if len(tail) == span and bool((tail[period:] == tail[:-period]).all()):
            return True
    return False


def prompt_statistics(keys: Sequence[str], lengths: np.ndarray) -> dict[str, Any]:
    """Returns length metrics of a step's groups.

    Args:
        keys: Key of each prompt.
        lengths: int [prompts, samples].
    """
    quantiles = np.quantile(lengths, QUANTILES, axis=1).T
    metrics: dict[str, Any] = {
        "length/by_problem": {key: row.tolist() for key, row in zip(keys, quantiles, strict=True)}
    }
    for q, column in zip(QUANTILES, quantiles.T, strict=True):
        metrics[f"length/prompt_p{round(100 * q)}"] = float(column.mean())
    metrics["length/prompt_variation"] = float((lengths.std(1) / lengths.mean(1).clip(min=1)).mean())
    return metrics


def pinball(predicted: np.ndarray, lengths: np.ndarray, quantile: float) -> float:
    """Returns the mean pinball loss of a predicted quantile.

    The loss is q (y − ŷ) where the length y is above the prediction ŷ, and (1 − q) (ŷ − y) below.

    Args:
        predicted: float [prompts].
        lengths: int [prompts, samples].
        quantile: Quantile q in (0, 1).
    """
    error = lengths - predicted[:, None]
    return float(np.maximum(quantile * error, (quantile - 1) * error).mean())
