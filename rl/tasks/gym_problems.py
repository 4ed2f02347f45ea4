"""Problems of reasoning-gym, whose data sets create each entry from its number."""

from __future__ import annotations

import bisect
import difflib
import warnings
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from paceline.rl.config.task import DatasetConfig, TaskConfig
from paceline.rl.errors import UserError
from paceline.rl.tasks.problems import MAX_CACHED_PROBLEMS, Problem
from paceline.rl.tasks.verifiable import reasoning_gym_score


class GymProblems:
    """A mixture of reasoning-gym data sets, concatenated, with sizes in proportion to their weights.

    Args:
        config: The recipe's task section.
        count: Total number of problems.
        seed: Seed of the first data set; those of the others follow from it.

    Raises:
        UserError: If a data set is unknown, or rejects its parameters.
    """

    def __init__(self, config: TaskConfig, count: int, seed: int) -> None:
        total = sum(d.weight for d in config.datasets)
        shares = [round(count * dataset.weight / total) for dataset in config.datasets[:-1]]
        shares.append(count - sum(shares))
        self._config = config
        self._ends = list(accumulate(shares))
        self._sources = [
            _create_dataset(dataset, share, seed + 7919 * position)
            for position, (dataset, share) in enumerate(zip(config.datasets, shares, strict=True))
        ]
        self._cached_problem = lru_cache(MAX_CACHED_PROBLEMS)(self._create_problem)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> Problem:
        return self._cached_problem(number)

    def _create_problem(self, number: int) -> Problem:
        position = bisect.bisect_right(self._ends, number)
        index = number - (self._ends[position - 1] if position else 0)
        source, dataset = self._sources[position], self._config.datasets[position]
        entry = source[index]
        question = entry["question"] + (" " + self._config.instruction if self._config.instruction else "")
        score = reasoning_gym_score(source, entry)
        return Problem(
            f"{position}/{index}",
            question,
            str(entry["answer"]),
            score,
            entry,
            dataset.name,
            dataset.difficulty,
        )

    def row_of(self, key: str) -> int | None:
        """Returns the number of the problem with this key, or None if there is none."""
        position, _, index = key.partition("/")
        if not (position.isdigit() and index.isdigit() and int(position) < len(self._ends)):
            return None
        row = int(index) + (self._ends[int(position) - 1] if int(position) else 0)
        return row if row < self._ends[int(position)] else None

    def difficulties(self) -> np.ndarray:
        """Returns float64 [problems], the difficulty of each problem's data set."""
        difficulties = [dataset.difficulty for dataset in self._config.datasets]
        return np.repeat(difficulties, np.diff([0, *self._ends]))


def reasoning_gym_problems(config: TaskConfig, count: int, seed: int) -> list[Problem]:
    """Returns ``count`` problems of the recipe's mixture.

    Raises:
        UserError: If a data set is unknown, or rejects its parameters.
    """
    problems = GymProblems(config, count, seed)
    return [problems[number] for number in range(count)]


def _create_dataset(dataset: DatasetConfig, size: int, seed: int) -> Any:
    """Creates a reasoning-gym data set of at least one entry.

    Raises:
        UserError: If the data set is unknown, or rejects its parameters.
    """
    with warnings.catch_warnings():
        # cellpylib, which it imports, compares strings with `is`: Python warns when it compiles that
        warnings.simplefilter("ignore", SyntaxWarning)
        import reasoning_gym
        from reasoning_gym.factory import DATASETS

    name, params = dataset.name, dataset.params
    if name not in DATASETS:
        closest = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.0)[0]
        raise UserError(
            f"task.datasets names {name!r}, which reasoning-gym does not have; did you mean {closest}?"
        )
    try:
        return reasoning_gym.create_dataset(name, size=max(size, 1), seed=seed, **params)
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(
            f"task.datasets {name}: reasoning-gym rejects the parameters {params} ({error}); correct params"
        ) from None
