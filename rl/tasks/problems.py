"""Defines a problem with its scorer, and collections that create problems on demand."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from paceline.rl.data.conversations import Message

MAX_CACHED_PROBLEMS = 2048  # per collection; enough for the problems of a few steps


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its scorer.

    Attributes:
        key: Name of the problem across epochs; completions of one key share drafts.
        question: Text of the question with the instruction; for a conversation, its last user turn.
        answer: Reference answer.
        score: Function from a completion's text to its reward.
        entry: The data set's own record; for rows, the columns by name.
        dataset: Name of the data set.
        difficulty: Difficulty on the recipe's own scale, for a curriculum.
        messages: Conversation to continue, each turn with ``role`` and ``content``; None if there is only the
            question.
        repeat: How often the same step has already used the problem; each time its samples get other seeds.
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
    """A collection of problems by number, each created on demand."""

    def __len__(self) -> int: ...
    def __getitem__(self, number: int) -> Problem: ...

    def row_of(self, key: str) -> int | None:
        """Returns the number of the problem with this key, or None if there is none."""
        ...

    def difficulties(self) -> np.ndarray:
        """Returns float64 [problems], the difficulty of each problem."""
        ...


class ProblemList:
    """A collection of problems that already exist."""

    def __init__(self, problems: Sequence[Problem]) -> None:
        self._problems = list(problems)
        self._rows = {problem.key: row for row, problem in enumerate(self._problems)}

    def __len__(self) -> int:
        return len(self._problems)

    def __getitem__(self, number: int) -> Problem:
        return self._problems[number]

    def row_of(self, key: str) -> int | None:
        """Returns the number of the problem with this key, or None if there is none."""
        return self._rows.get(key)

    def difficulties(self) -> np.ndarray:
        """Returns float64 [problems], the difficulty of each problem."""
        return np.array([problem.difficulty for problem in self._problems])
