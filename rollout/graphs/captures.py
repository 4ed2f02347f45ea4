"""Captured graphs by key: each is made when it is first asked for, and a failed one is not tried again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)
Captured = TypeVar("Captured")


class Captures(Generic[Key, Captured]):
    """Keeps what was captured for each key.

    Args:
        capture: Function that captures the graph of a key; a RuntimeError is a failure.

    Attributes:
        fallbacks: Reasons why a graph could not be used, with their counts.
    """

    def __init__(self, capture: Callable[[Key], Captured]) -> None:
        self._capture = capture
        self._captured: dict[Key, Captured] = {}
        self._failed: dict[Key, str] = {}
        self._addresses: tuple[int, ...] | None = None
        self.fallbacks: Counter[str] = Counter()

    @property
    def keys(self) -> tuple[Key, ...]:
        """The keys that were captured."""
        return tuple(self._captured)

    def get(self, key: Key) -> Captured | None:
        """Returns the capture of a key, or None if capturing failed."""
        if key not in self._captured and key not in self._failed:
            try:
                self._captured[key] = self._capture(key)
            except RuntimeError as error:
                self._failed[key] = str(error).splitlines()[0]
        if key in self._failed:
            self.fallbacks[f"capture failed: {self._failed[key]}"] += 1
            return None
        return self._captured[key]

    def follow(self, addresses: tuple[int, ...], planned: Iterable[Key] = ()) -> None:
        """Drops the captures if what they read has moved, as when a trainer wraps its module.

        Args:
            addresses: Addresses of the weights. The first call says where captures find them.
            planned: Keys to capture anew at once, if all of them had been captured.
        """
        if addresses != self._addresses and self._addresses is not None:
            wanted = tuple(planned)
            again = set(wanted) <= self._captured.keys()
            self._captured.clear()
            self._failed.clear()
            for key in wanted if again else ():
                self.get(key)
        self._addresses = addresses
