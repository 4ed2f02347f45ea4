"""Which batches and contexts count as alike."""

from __future__ import annotations

import bisect
from typing import NamedTuple

_BATCHES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
_CONTEXTS = (512, 2048, 8192, 32768)


class Bucket(NamedTuple):
    """Active sequences and tokens of the longest one, each rounded up to a step of its scale."""

    batch: int
    context: int


def bucket_of(active: int, context: int) -> Bucket:
    """The bucket of a batch."""
    return Bucket(_up(active, _BATCHES), _up(context, _CONTEXTS))


def _up(value: int, scale: tuple[int, ...]) -> int:
    return scale[min(bisect.bisect_left(scale, value), len(scale) - 1)]
