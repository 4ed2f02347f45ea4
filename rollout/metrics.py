"""Metrics of finished rollouts."""

from __future__ import annotations

from collections.abc import Iterable

from paceline.rollout.api import Rollout


def mean_acceptance_length(rollouts: Iterable[Rollout]) -> float:
    """Returns the mean tokens per sequence and target forward, prefills excluded; 1 is plain decoding."""
    tokens = steps = 0
    for rollout in rollouts:
        tokens += max(len(rollout.token_ids) - 1, 0)
        steps += rollout.stats.steps
    return tokens / steps if steps else 1.0
