"""Estimates of completion lengths, which the scheduler uses to order requests."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from paceline.rollout.api import Request

_DECAY = 0.9  # weight of the old mean at each observation: lengths drift while the policy trains


class LengthEstimate(Protocol):
    """Predicts completion lengths. Wrong predictions cost speed, never correctness."""

    def predict(self, request: Request) -> float | None:
        """Returns the expected number of completion tokens, or None if nothing is known."""
        ...

    def observe(self, request: Request, tokens: int) -> None:
        """Records that a completion of ``request`` finished by itself after ``tokens`` tokens."""
        ...


class ObservedLengths:
    """Predicts a decayed mean of the lengths seen in the request's group, or over all groups if it has none.

    Args:
        max_groups: Maximum number of groups remembered; the least recently observed is dropped first.
    """

    def __init__(self, max_groups: int = 100_000) -> None:
        self.max_groups = max_groups
        self._groups: dict[Hashable, float] = {}
        self._overall: float | None = None

    def predict(self, request: Request) -> float | None:
        """Returns the mean length of the request's group, the overall mean if unknown, or None at first."""
        return self._groups.get(request.group, self._overall) if request.group is not None else self._overall

    def observe(self, request: Request, tokens: int) -> None:
        """Adds one completion length to the means of its group and of all groups."""
        self._overall = tokens if self._overall is None else _DECAY * self._overall + (1 - _DECAY) * tokens
        if request.group is None:
            return
        mean = self._groups.pop(request.group, None)
        self._groups[request.group] = tokens if mean is None else _DECAY * mean + (1 - _DECAY) * tokens
        if len(self._groups) > self.max_groups:
            del self._groups[next(iter(self._groups))]
