"""Schedules of draft depths by batch size, in the format of vLLM's ``num_speculative_tokens_per_batch_size``.

Entries are (from, to, draft tokens); they begin at a batch of one and do not overlap.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from paceline.rollout.strategy import Strategy, default_arms
from paceline.rollout.strategy.buckets import Bucket

_ANY_BATCH = 100_000  # vLLM cuts the last entry to its largest batch


def draft_depths(method: str, maximum: int) -> list[int]:
    """Returns the depths to choose from by default, 0 among them, with at most ``maximum`` draft tokens."""
    chains = {arm.depth for arm in default_arms(method, maximum, chains_only=True)}
    return sorted({0, maximum} | chains)


def listing_schedule(depths: Sequence[int]) -> list[list[int]]:
    """Returns a schedule that names all depths, so that vLLM prepares graphs for each of them.

    Args:
        depths: Draft depths; the largest becomes that of all larger batches.
    """
    *others, largest = sorted(depths)
    named = [[size, size, depth] for size, depth in enumerate(others, 1)]
    return [*named, [len(others) + 1, _ANY_BATCH, largest]]


def learned_schedule(best_arms: Mapping[Bucket, tuple[Strategy, int]]) -> list[tuple[int, int, int]]:
    """Returns the best depth of each batch size seen.

    Args:
        best_arms: Best arm and number of steps of each bucket, see `BanditSelector.best_arms`. Of several
            contexts, the one with most steps counts; sizes between two buckets belong to the larger one.
    """
    best: dict[int, tuple[int, int]] = {}
    for bucket, (arm, steps) in best_arms.items():
        best[bucket.batch] = max(best.get(bucket.batch, (0, 0)), (steps, arm.depth))
    ends = [0, *sorted(best)]
    return [(below + 1, end, best[end][1]) for below, end in itertools.pairwise(ends)]
