"""Orders of problems, whose cost per step does not grow with the data set."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)  # a step may span two epochs
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns int64 [count], a permutation of the numbers below ``count`` that is the same on every machine.

    It is drawn with numpy's legacy generator, whose streams do not change between releases (NEP 19), so a
    resumed run continues in the order in which it began.

    Args:
        count: Number of problems.
        seed: The run's seed.
        epoch: Number of the epoch.
    """
    words = np.frombuffer(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=32).digest(), np.uint32)
    order = np.random.RandomState(words).permutation(count)
    order.flags.writeable = False  # the cached array is shared by later steps
    return order


def shuffled(count: int, rng: random.Random) -> Iterator[int]:
    """Yields every number below ``count`` once, in random order (Fisher–Yates).

    The cost grows with the numbers taken, not with ``count``.

    Args:
        count: Number of numbers.
        rng: Source of randomness.
    """
    moved: dict[int, int] = {}
    for i in range(count):
        j = rng.randrange(i, count)
        yield moved.get(j, j)
        moved[j] = moved.pop(i, i)
