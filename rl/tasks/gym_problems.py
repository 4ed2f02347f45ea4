"""Problems of reasoning-gym, whose data sets make each entry from its number."""

from __future__ import annotations

import bisect
import difflib
from functools import lru_cache
from itertools import accumulate
from typing import Any

import numpy as np

from paceline.rl.config.task import DatasetConfig, TaskConfig
from paceline.rl.errors import UserError
from paceline.rl.tasks.problems import KEPT, Problem
from paceline.rl.tasks.verifiable import reasoning_gym_score


class GymProblems:
    """A mixture of reasoning-gym's data sets, their shares by weight, one data set after the other.

    Raises:
        UserError: for an unknown data set or bad parameters.
    """

    def __init__(self, config: TaskConfig, count: int, seed: int) -> None:
        total = sum(d.weight for d in config.datasets)
        shares = [round(count * dataset.weight / total) for dataset in config.datasets[:-1]]
        shares.append(count - sum(shares))
        self._config = config
        self._ends = list(accumulate(shares))
        self._sources = [
            _create_dataset(dataset, share, seed + 7919 * order)
            for order, (dataset, share) in enumerate(zip(config.datasets, shares, strict=True))
        ]
        self._made = lru_cache(KEPT)(self._make)

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, number: int) -> Problem:
        return self._made(number)

    def _make(self, number: int) -> Problem:
        order = bisect.bisect_right(self._ends, number)
        index = number - (self._ends[order - 1] if order else 0)
        source, dataset = self._sources[order], self._config.datasets[order]
        entry = source[index]
        question = entry["question"] + (" " + self._config.instruction if self._config.instruction else "")
        score = reasoning_gym_score(source, entry)
        return Problem(
            f"{order}/{index}", question, str(entry["answer"]), score, entry, dataset.name, dataset.difficulty
        )

    def row_of(self, key: str) -> int | None:
        order, _, index = key.partition("/")
        if not (order.isdigit() and index.isdigit() and int(order) < len(self._ends)):
            return None
        row = int(index) + (self._ends[int(order) - 1] if int(order) else 0)
        return row if row < self._ends[int(order)] else None

    def difficulties(self) -> np.ndarray:
        return np.repeat([d.difficulty for d in self._config.datasets], np.diff([0, *self._ends]))


def reasoning_gym_problems(config: TaskConfig, count: int, seed: int) -> list[Problem]:
    """``count`` problems of the mixture, the data sets' shares by weight."""
    problems = GymProblems(config, count, seed)
    return [problems[number] for number in range(count)]


def _create_dataset(dataset: DatasetConfig, size: int, seed: int) -> Any:
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    name, params = dataset.name, dataset.params
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.0)[0]
        raise UserError(
            f"task.datasets names {name!r}, which reasoning-gym does not have; did you mean {close}?"
        )
    try:
        return reasoning_gym.create_dataset(name, size=max(size, 1), seed=seed, **params)
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(
            f"task.datasets {name}: reasoning-gym refuses the parameters {params}: {error}"
        ) from None
