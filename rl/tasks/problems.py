"""A question with its scorer, and collections of them that make each when it is wanted."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from paceline.rl.data.conversations import Message

KEPT = 2048  # problems that a collection keeps in memory once they are made: those of a few steps


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its scorer.

    Attributes:
        key: Names the problem across epochs: the samples of one key share drafts.
        question: What is asked, instruction included; of a conversation the user's last turn.
        answer: The reference answer.
        score: Completion text → reward.
        entry: The data set's own record: a row's columns by name.
        dataset: Name of the data set.
        difficulty: For a curriculum, on the recipe's own scale.
        messages: The conversation to go on with, each turn with ``role`` and ``content``; None where the
            question is all.
        repeat: How often the same step has asked it before; the samples of each time are drawn with other
            seeds.
    """

    key: str
    question: str
    answer: str
    score: Callable[[str], float]
    entry: dict[str, Any]
    dataset: str
    difficulty: float = 0.0
    messages: tuple[Message, ...] | None = None
    repeat: int = 0


class Problems(Protocol):
    """Problems by number, each made when it is wanted."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Problem: ...

    def row_of(self, key: str) -> int | None:
        """The number of a problem; None where there is none of this key."""
        ...

    def difficulties(self) -> np.ndarray:
        """float64 [problems]."""
        ...


class Listed:
    """Problems that are all made already."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._problems = list(problems)
        self._rows = {problem.key: row for row, problem in enumerate(self._problems)}

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, number: int) -> Problem:
        return self._problems[number]

    def row_of(self, key: str) -> int | None:
        return self._rows.get(key)

    def difficulties(self) -> np.ndarray:
        return np.array([problem.difficulty for problem in self._problems])
