"""Orders in which problems are asked, without work that grows with the data set in every step."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)  # a step may reach from one epoch into the next
def epoch_order(count: int, seed: int, epoch: int) -> np.ndarray:
    """Returns int64 [count], a permutation of the numbers below ``count`` that follows from the arguments
    alone, on every machine.

    It is drawn by numpy's legacy generator, whose streams do not change between releases (NEP 19): a resumed
    run goes on in the order that it began with.
    """
    words = np.frombuffer(hashlib.blake2b(f"{seed}/{epoch}".encode(), digest_size=32).digest(), np.uint32)
    order = np.random.RandomState(words).permutation(count)
    order.flags.writeable = False  # it is kept for the next step
    return order


def shuffled(count: int, chance: random.Random) -> Iterator[int]:
    """Yields every number below ``count`` once, in random order (Fisher–Yates); the cost grows with what is
    taken, not with ``count``.
    """
    moved: dict[int, int] = {}
    for i in range(count):
        j = chance.randrange(i, count)
        yield moved.get(j, j)
        moved[j] = moved.pop(i, i)
