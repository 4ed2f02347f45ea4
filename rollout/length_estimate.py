"""How long a completion will be, as far as the scheduler needs to know."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Protocol

from paceline.rollout.api import Request

_DECAY = 0.9


class LengthEstimate(Protocol):
    """Predicts completion lengths. May be wrong: only speed depends on it."""

    def predict(self, request: Request) -> float | None:
        """Expected completion tokens, or None when nothing is known."""
        ...

    def observe(self, request: Request, tokens: int) -> None:
        """A completion of ``request`` ended by itself after ``tokens``."""
        ...


class ObservedLengths:
    """The mean length already seen for the request's group, else the mean over all groups; recent completions
    weigh more.

    Args:
        max_groups: Groups remembered; the ones not seen for longest go first.
    """

    def __init__(self, max_groups: int = 100_000) -> None:
        self.max_groups = max_groups
        self._groups: dict[Hashable, float] = {}
        self._overall: float | None = None

    def predict(self, request: Request) -> float | None:
        return self._groups.get(request.group, self._overall) if request.group is not None else self._overall

    def observe(self, request: Request, tokens: int) -> None:
        self._overall = tokens if self._overall is None else _DECAY * self._overall + (1 - _DECAY) * tokens
        if request.group is None:
            return
        known = self._groups.pop(request.group, None)
        self._groups[request.group] = tokens if known is None else _DECAY * known + (1 - _DECAY) * tokens
        if len(self._groups) > self.max_groups:
            del self._groups[next(iter(self._groups))]
