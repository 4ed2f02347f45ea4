"""Measured times, of which medians count."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Mapping
from statistics import median
from types import MappingProxyType
from typing import TypeVar

K = TypeVar("K", bound=Hashable)

RECENT_TIMES = 21  # times of which the median counts


class Times(dict[K, float]):
    """Maps each key to the median of its latest times.

    A mean would follow outliers, which come from other work on the machine: a strategy that met one in its
    few steps would then look slow, and never run again to show otherwise.

    Args:
        medians: Saved medians, which count as one time each.
    """

    def __init__(self, medians: Mapping[K, float] = MappingProxyType({})) -> None:
        super().__init__(medians)
        self._recent = {key: deque([seconds], RECENT_TIMES) for key, seconds in medians.items()}

    def add(self, key: K, seconds: float) -> None:
        """Adds a time."""
        recent = self._recent.setdefault(key, deque(maxlen=RECENT_TIMES))
        recent.append(seconds)
        self[key] = median(recent)

    def count(self, key: K) -> int:
        """Returns the number of latest times."""
        return len(self._recent.get(key, ()))

    def rescale(self, key: K, factor: float) -> None:
        """Multiplies the times of a key."""
        recent = self._recent[key] = deque((factor * t for t in self._recent[key]), RECENT_TIMES)
        self[key] = median(recent)

    def drop(self, key: K) -> float:
        """Drops the times of a key and returns their median."""
        del self._recent[key]
        return self.pop(key)
