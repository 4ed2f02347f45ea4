"""Loads a recipe's problems, puts them in order, and separates those that are held out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np

from paceline.rl.config.task import TaskConfig
from paceline.rl.data.order import epoch_order, shuffled
from paceline.rl.data.survey import RowSource, Survey, chosen_share
from paceline.rl.errors import UserError
from paceline.rl.tasks.gym_problems import GymProblems
from paceline.rl.tasks.problems import Problem, ProblemList, Problems
from paceline.rl.tasks.row_problems import RowProblems, rows_of

__all__ = ["Problem", "Task", "load_heldout_task", "load_task"]


class Task:
    """Problems that are drawn in epochs.

    Args:
        problems: At least one problem.
        seed: Seed of the order.
        rows: int64 [problems], numbers of the problems to use; None uses all.
        heldout: int64 [held-out problems], numbers of the problems that are held out; None for none.

    Attributes:
        source: All problems, used or not.
        rows: Numbers of the problems that are used.
        fits: Whether the prompt of a problem, given by its number, fits in the context; None if all do. Set
            for data sets that are too large to encode every prompt before the first step.
        notes: What was found when the data was read, as lines for the user.
    """

    def __init__(
        self,
        problems: Sequence[Problem] | Problems,
        seed: int,
        rows: np.ndarray | None = None,
        heldout: np.ndarray | None = None,
    ) -> None:
        self.source: Problems = problems if hasattr(problems, "row_of") else ProblemList(problems)  # type: ignore[assignment]
        self._seed, self._heldout = seed, np.zeros(0, np.int64) if heldout is None else heldout
        self.rows = np.arange(len(self.source)) if rows is None else rows
        self.fits: Callable[[int], bool] | None = None
        self.notes: list[str] = []

    @property
    def problems(self) -> Sequence[Problem]:
        """The problems that are used, each created when it is accessed."""
        return _Selected(self.source, self.rows)

    @property
    def difficulties(self) -> np.ndarray:
        """The difficulties of the problems that are used, float64 [problems]."""
        return self.source.difficulties()[self.rows]

    def find(self, key: str) -> Problem:
        """Returns the problem with this key, used or held out, without reading any other.

        Raises:
            KeyError: If there is none.
        """
        row = self.source.row_of(key)
        if row is None:
            raise KeyError(key)
        return self.source[row]

    def heldout(self) -> Task:
        """Returns the held-out problems as a task."""
        return Task(self.source, self._seed, self._heldout)

    def batch(self, step: int, count: int) -> list[Problem]:
        """Returns ``count`` problems for a step.

        They depend only on the seed and the step, so a resumed run continues in the same order.

        Args:
            step: Number of the step, from 0.
            count: Number of problems.

        Raises:
            UserError: If fewer than ``count`` prompts fit in the context.
        """
        window = (divmod(position, len(self.rows)) for position in range(step * count, (step + 1) * count))
        in_order = (self._position(epoch, offset) for epoch, offset in window)
        chosen = [position for position in in_order if self._usable(position)]
        if len(chosen) < count:  # positions whose prompts are too long are replaced by others at random
            excluded = set(chosen)
            others = shuffled(len(self.rows), random.Random(f"{self._seed}/instead/{step}"))
            usable = (position for position in others if position not in excluded and self._usable(position))
            chosen += islice(usable, count - len(chosen))
        if len(chosen) < count:
            raise UserError(
                f"rollout.max_context leaves room for only {len(chosen)} of {len(self.rows)} prompts, and "
                f"{count} are needed; raise it"
            )
        return self._with_repeats(chosen)

    def take(self, positions: Iterable[int], count: int) -> list[Problem]:
        """Returns the first ``count`` problems whose prompts fit, of those at ``positions`` in `problems`."""
        usable = (position for position in positions if self._usable(position))
        return self._with_repeats(islice(usable, count))

    def _position(self, epoch: int, offset: int) -> int:
        """Returns the position in `rows` of the problem at an offset in an epoch."""
        return int(epoch_order(len(self.rows), self._seed, epoch)[offset])

    def _usable(self, position: int) -> bool:
        """Whether the prompt of the problem at a position in `rows` fits in the context."""
        return self.fits is None or self.fits(int(self.rows[position]))

    def _with_repeats(self, positions: Iterable[int]) -> list[Problem]:
        """Returns the problems at these positions; ``repeat`` counts earlier uses of the same position."""
        seen: Counter[int] = Counter()
        problems = []
        for position in positions:
            problem = self.source[int(self.rows[position])]
            problems.append(replace(problem, repeat=seen[position]) if seen[position] else problem)
            seen[position] += 1
        return problems


class _Selected(Sequence[Problem]):
    """A view of some problems, given by their numbers."""

    def __init__(self, source: Problems, rows: np.ndarray) -> None:
        self._source, self._rows = source, rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self._source[int(row)] for row in self._rows[index]]
        return self._source[int(self._rows[index])]

    def __iter__(self) -> Iterator[Problem]:
        return (self._source[int(row)] for row in self._rows)


def load_task(config: TaskConfig, seed: int, check: bool = True) -> Task:
    """Builds the task of a recipe: the problems that are trained on.

    Args:
        config: The recipe's task section.
        seed: The run's seed, which determines the order and the held-out problems.
        check: Whether to read and check every row. A process that only looks up problems by their keys skips
            this, and reads no other rows.

    Raises:
        UserError: If a data set is unknown or rejects its parameters, or a row has no valid prompt or answer;
            the message names its file and line.
    """
    if config.source == "reasoning_gym":
        gym = GymProblems(config, config.size, seed)
        return _split(gym, config, seed, np.arange(len(gym)), np.arange(len(gym), dtype=np.uint64))
    problems = RowProblems(rows_of(config), config)
    if not check:
        return Task(problems, seed)
    survey = problems.survey
    _, first_rows, inverse = np.unique(survey.prompts, return_index=True, return_inverse=True)
    rows = np.sort(first_rows) if config.duplicates == "drop" else np.arange(len(problems))
    task = _split(problems, config, seed, rows, survey.prompts)
    if len(first_rows) < len(problems):
        task.notes.append(_duplicates_note(survey, first_rows[inverse], config, problems.source))
    return task


def load_heldout_task(config: TaskConfig, seed: int) -> Task:
    """Returns the problems that `load_task` holds out for the same arguments.

    They are a fraction of about ``task.heldout`` of all problems.

    Raises:
        UserError: If `load_task` raises it, or if nothing is held out.
    """
    if config.heldout == 0:
        raise UserError("task.heldout is 0, so no problems are held out; write a share, for example 0.02")
    return load_task(config, seed).heldout()


def _split(problems: Problems, config: TaskConfig, seed: int, rows: np.ndarray, digests: np.ndarray) -> Task:
    """Separates the held-out problems from ``rows``, by the digests of their prompts.

    Raises:
        UserError: If all problems are held out, or none.
    """
    if not config.heldout:
        return Task(problems, seed, rows)
    heldout = chosen_share(digests[rows], config.heldout, seed)
    if heldout.all() or not heldout.any():
        which = "all" if heldout.all() else "none"
        raise UserError(
            f"task.heldout is {config.heldout}, which holds out {which} of {len(rows)} problems; write "
            "another share"
        )
    task = Task(problems, seed, rows[~heldout], rows[heldout])
    task.notes.append(
        f"task: {int(heldout.sum())} of {len(rows)} problems are held out (task.heldout {config.heldout:g})"
    )
    return task


def _duplicates_note(survey: Survey, first: np.ndarray, config: TaskConfig, source: RowSource) -> str:
    """Describes how many rows repeat the prompt of an earlier row, and how many of these give another answer.

    Args:
        survey: Summary of all rows.
        first: int64 [rows], the first row with the same prompt.
        config: The recipe's task section.
        source: The rows, for their locations.
    """
    repeats = np.flatnonzero(first != np.arange(len(first)))
    conflicts = repeats[survey.golds[repeats] != survey.golds[first[repeats]]]
    handling = (
        "they are left out (task.duplicates: drop)"
        if config.duplicates == "drop"
        else "all are used (task.duplicates: drop keeps only the first)"
    )
    text = f"task: {len(repeats)} of {len(first)} rows repeat the prompt of an earlier row; {handling}"
    if not len(conflicts):
        return text
    example = f"{source.location(int(conflicts[0]))} and {source.location(int(first[conflicts[0]]))}"
    return f"{text}; {len(conflicts)} of them give another answer, for example {example}"
