"""What a run asks: the problems of a recipe's task, their order, and those that are held out."""

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
from paceline.rl.tasks.problems import Listed, Problem, Problems
from paceline.rl.tasks.row_problems import RowProblems, rows_of

__all__ = ["Problem", "Task", "load_heldout_task", "load_task"]


class Task:
    """Problems, drawn in epochs.

    Args:
        problems: At least one.
        seed: Of the order.
        rows: int64, the numbers of those that are asked; None asks all.
        heldout: int64, the numbers of those that are not.

    Attributes:
        rows: The numbers of the problems that are asked.
        fits: Whether a problem, by its number, may be asked; None where all may. For data sets that are too
            large to try all of them before the first step.
        notes: What was found when the data was read, in lines for the user.
    """

    def __init__(
        self,
        problems: Sequence[Problem] | Problems,
        seed: int,
        rows: np.ndarray | None = None,
        heldout: np.ndarray | None = None,
    ) -> None:
        self.source: Problems = problems if hasattr(problems, "row_of") else Listed(problems)  # type: ignore[assignment]
        self._seed, self._heldout = seed, np.zeros(0, np.int64) if heldout is None else heldout
        self.rows = np.arange(len(self.source)) if rows is None else rows
        self.fits: Callable[[int], bool] | None = None
        self.notes: list[str] = []

    @property
    def problems(self) -> Sequence[Problem]:
        """Those that are asked, each made when it is looked at."""
        return _Selected(self.source, self.rows)

    @property
    def difficulties(self) -> np.ndarray:
        """float64 [problems], of those that are asked."""
        return self.source.difficulties()[self.rows]

    def find(self, key: str) -> Problem:
        """The problem of a key, asked or held out; nothing else is read for it.

        Raises:
            KeyError: where the data has none of this key.
        """
        row = self.source.row_of(key)
        if row is None:
            raise KeyError(key)
        return self.source[row]

    def heldout(self) -> Task:
        """The problems that this one holds out."""
        return Task(self.source, self._seed, self._heldout)

    def batch(self, step: int, count: int) -> list[Problem]:
        """The ``count`` problems of step ``step``: a function of (seed, step), so that a resumed run goes on
        in the same order.
        """
        window = (divmod(position, len(self.rows)) for position in range(step * count, (step + 1) * count))
        asked = [place for epoch, offset in window if self._may(place := self._place(epoch, offset))]
        if len(asked) < count:
            taken = set(asked)
            others = shuffled(len(self.rows), random.Random(f"{self._seed}/instead/{step}"))
            asked += islice((p for p in others if p not in taken and self._may(p)), count - len(asked))
        if len(asked) < count:
            raise UserError(
                f"task: only {len(asked)} of {len(self.rows)} problems can be asked, {count} are wanted in a "
                "step"
            )
        return self._numbered(asked)

    def take(self, places: Iterable[int], count: int) -> list[Problem]:
        """Returns the first ``count`` problems that may be asked (`fits`) of those at ``places``, which count
        in `problems`.
        """
        return self._numbered(islice((place for place in places if self._may(place)), count))

    def _place(self, epoch: int, offset: int) -> int:
        return int(epoch_order(len(self.rows), self._seed, epoch)[offset])

    def _may(self, place: int) -> bool:
        return self.fits is None or self.fits(int(self.rows[place]))

    def _numbered(self, places: Iterable[int]) -> list[Problem]:
        """Returns the problems at these places; one that comes again says in ``repeat`` how often it came
        before.
        """
        seen: Counter[int] = Counter()
        problems = []
        for place in places:
            problem = self.source[int(self.rows[place])]
            problems.append(replace(problem, repeat=seen[place]) if seen[place] else problem)
            seen[place] += 1
        return problems


class _Selected(Sequence[Problem]):
    """Some of the problems, by number."""

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
        config: The task section.
        seed: The run's: of the order, and of which problems are held out.
        check: Whether every row is read once and checked. A process that only looks problems up by their keys
            does without, and reads no other row.

    Raises:
        UserError: unknown data set, bad parameters, or a row that cannot be asked or scored, named by file
            and line.
    """
    if config.source == "reasoning_gym":
        gym = GymProblems(config, config.size, seed)
        return _split(gym, config, seed, np.arange(len(gym)), np.arange(len(gym), dtype=np.uint64))
    problems = RowProblems(rows_of(config), config)
    if not check:
        return Task(problems, seed)
    found = problems.survey
    _, first, again = np.unique(found.prompts, return_index=True, return_inverse=True)
    rows = np.sort(first) if config.duplicates == "drop" else np.arange(len(problems))
    task = _split(problems, config, seed, rows, found.prompts)
    if len(first) < len(problems):
        task.notes.append(_says_duplicates(found, first[again], config, problems.source))
    return task


def load_heldout_task(config: TaskConfig, seed: int) -> Task:
    """The problems that `load_task` with the same arguments leaves out, a share ``task.heldout`` of all.

    Raises:
        UserError: as `load_task`, and where nothing is held out.
    """
    if config.heldout == 0:
        raise UserError("task.heldout is 0: no problems are held out; write a share, for example 0.02")
    return load_task(config, seed).heldout()


def _split(problems: Problems, config: TaskConfig, seed: int, rows: np.ndarray, digests: np.ndarray) -> Task:
    if not config.heldout:
        return Task(problems, seed, rows)
    out = chosen_share(digests[rows], config.heldout, seed)
    if out.all() or not out.any():
        which = "all" if out.all() else "none"
        raise UserError(
            f"task.heldout is {config.heldout}: of {len(rows)} problems that holds out {which}; write "
            "another share"
        )
    task = Task(problems, seed, rows[~out], rows[out])
    task.notes.append(
        f"task: {int(out.sum())} of {len(rows)} problems are held out (task.heldout {config.heldout:g})"
    )
    return task


def _says_duplicates(found: Survey, first: np.ndarray, config: TaskConfig, source: RowSource) -> str:
    """Says how many rows repeat the prompt of an earlier one, and how many of those give it another
    answer.
    """
    repeats = np.flatnonzero(first != np.arange(len(first)))
    other = repeats[found.golds[repeats] != found.golds[first[repeats]]]
    fate = (
        "left out (task.duplicates drop)"
        if config.duplicates == "drop"
        else "each is asked (task.duplicates: drop keeps the first)"
    )
    text = f"task: {len(repeats)} of {len(first)} rows repeat the prompt of an earlier one; {fate}"
    if not len(other):
        return text
    where = f"{source.place(int(other[0]))} and {source.place(int(first[other[0]]))}"
    return f"{text}; {len(other)} of them with another answer, such as {where}"
