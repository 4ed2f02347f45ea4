"""Which problems a step asks: in epochs, or those that are about as hard as the policy can bear."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from paceline.rl.config.task import CurriculumConfig
from paceline.rl.data.order import shuffled
from paceline.rl.tasks.task import Problem, Task


class PromptChoice(Protocol):
    """Every rank chooses alike: from the step, the seed and what all ranks have observed."""

    def choose(self, step: int, count: int) -> list[Problem]:
        """The problems of a step."""
        ...

    def more(self, step: int, count: int, round_: int, rank: int) -> list[Problem]:
        """Further problems of one rank, where the first said nothing."""
        ...

    def observe(self, reward: float) -> None:
        """The mean reward of a step, over all ranks."""
        ...

    def state(self) -> dict[str, Any]:
        """What was learned, as JSON."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave."""
        ...


class Epochs:
    """Every problem once in each epoch, in an order of its own."""

    def __init__(self, task: Task, seed: int) -> None:
        self._task, self._seed = task, seed

    def choose(self, step: int, count: int) -> list[Problem]:
        return self._task.batch(step, count)

    def more(self, step: int, count: int, round_: int, rank: int) -> list[Problem]:
        chance = random.Random(f"{self._seed}/more/{step}/{round_}/{rank}")
        return self._task.take(shuffled(len(self._task.rows), chance), count)

    def observe(self, reward: float) -> None:
        """The order does not depend on it."""

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """There is none."""


class Curriculum:
    """The problems whose difficulty is nearest to a target that follows the reward (AdaRFT, Shi et al., arXiv
    2504.05520): T ← clip(T + η tanh(α (reward − β)), easiest, hardest). Among those equally near, chance
    decides anew in every step.

    Args:
        task: Problems with difficulties.
        seed: Of the choice among equals.
        config: T at first, η, α and β.
    """

    def __init__(self, task: Task, seed: int, config: CurriculumConfig) -> None:
        self._task, self._seed, self._config = task, seed, config
        difficulties = task.difficulties
        self._places = np.argsort(difficulties, kind="stable")
        self._levels, self._begins = np.unique(difficulties[self._places], return_index=True)
        self._ends = np.append(self._begins[1:], len(difficulties))
        self._low, self._high = float(self._levels[0]), float(self._levels[-1])
        self.target = min(max(config.start, self._low), self._high)

    def choose(self, step: int, count: int) -> list[Problem]:
        return self._task.take(self._nearest(f"{self._seed}/{step}"), count)

    def more(self, step: int, count: int, round_: int, rank: int) -> list[Problem]:
        return self._task.take(self._nearest(f"{self._seed}/more/{step}/{round_}/{rank}"), count)

    def _nearest(self, seed: str) -> Iterator[int]:
        """Yields places of problems, the nearest difficulties first, equally near ones in random order, at a
        cost that grows with what is taken.
        """
        chance = random.Random(seed)
        above = int(np.searchsorted(self._levels, self.target))
        below = above - 1
        while below >= 0 or above < len(self._levels):
            down = self.target - self._levels[below] if below >= 0 else math.inf
            up = self._levels[above] - self.target if above < len(self._levels) else math.inf
            levels = [level for level, nearest in ((below, down <= up), (above, up <= down)) if nearest]
            below, above = below - int(down <= up), above + int(up <= down)
            spans = [range(self._begins[level], self._ends[level]) for level in levels]
            first = len(spans[0])
            for i in shuffled(sum(map(len, spans)), chance):
                yield int(self._places[spans[0][i] if i < first else spans[1][i - first]])

    def observe(self, reward: float) -> None:
        moved = self.target + self._config.step * math.tanh(
            self._config.sensitivity * (reward - self._config.reward)
        )
        self.target = min(max(moved, self._low), self._high)

    def state(self) -> dict[str, Any]:
        return {"target": self.target}

    def load_state(self, state: dict[str, Any]) -> None:
        self.target = float(state.get("target", self.target))


def prompt_choice(task: Task, seed: int, config: CurriculumConfig | None) -> PromptChoice:
    """As the recipe has it."""
    return Epochs(task, seed) if config is None else Curriculum(task, seed, config)
