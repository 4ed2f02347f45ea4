"""Buckets of batch sizes and contexts that are expected to cost about the same."""

from __future__ import annotations

import bisect
import math
from typing import NamedTuple

_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_CONTEXTS = (512, 2048, 8192, 32768)


class Bucket(NamedTuple):
    """The number of active sequences and the length of the longest one, each rounded up on its scale."""

    batch: int
    context: int


def bucket_of(active: int, context: int) -> Bucket:
    """Returns the bucket of a batch of ``active`` sequences whose longest has ``context`` tokens."""
    return Bucket(_round_up(active, _BATCHES), _round_up(context, _CONTEXTS))


def distance(a: Bucket, b: Bucket) -> float:
    """Returns how different two buckets are: doublings of the batch, and of the context as far as it matters.

    The context counts a quarter, because most of a step's time does not depend on it.
    """
    return abs(math.log2(a.batch / b.batch)) + 0.25 * abs(math.log2(a.context / b.context))


def _round_up(value: int, scale: tuple[int, ...]) -> int:
    return scale[min(bisect.bisect_left(scale, value), len(scale) - 1)]
