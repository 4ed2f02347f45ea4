"""What is observed of lengths: quantiles by prompt, as CASTILLO (arXiv 2505.16881) reports them, and
loops.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

QUANTILES = (0.25, 0.5, 0.75, 0.99)


def is_loop(token_ids: Sequence[int], repeats: int = 4, least: int = 32, longest_period: int = 64) -> bool:
    """Whether a completion ends in a degenerate loop: one stretch of tokens again and again.

    Args:
        token_ids: Of the completion.
        repeats: Times that the stretch must stand at the end, one after the other.
        least: Tokens that these must make up together.
        longest_period: Tokens of the longest stretch that is looked for.
    """
    ids = np.asarray(token_ids)
    for period in range(1, min(longest_period, len(ids) // repeats) + 1):
        span = max(repeats * period, least)
        tail = ids[-span:]
        if len(tail) == span and bool((tail[period:] == tail[:-period]).all()):
            return True
    return False


def prompt_statistics(keys: Sequence[str], lengths: np.ndarray) -> dict[str, Any]:
    """Metrics of a step's groups.

    Args:
        keys: Of each prompt.
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
    """Mean pinball loss of a predicted quantile: q (y − ŷ) where the length is above it, (1 − q) (ŷ − y)
    below.

    Args:
        predicted: [prompts].
        lengths: [prompts, samples].
        quantile: q.
    """
    error = lengths - predicted[:, None]
    return float(np.maximum(quantile * error, (quantile - 1) * error).mean())
