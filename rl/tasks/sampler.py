"""Chooses the problems of a step: in epochs, or by a difficulty that suits the policy."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from typing import Any, Protocol

import numpy as np

from paceline.rl.config.task import CurriculumConfig
from paceline.rl.data.order import shuffled
from paceline.rl.tasks.task import Problem, Task


class PromptSampler(Protocol):
    """Chooses the same problems on every rank, from the step, the seed and what all ranks observed."""

    def choose(self, step: int, count: int) -> list[Problem]:
        """Returns the problems of a step.

        Args:
            step: Number of the step, from 0.
            count: Number of problems, over all ranks.
        """
        ...

    def more(self, step: int, count: int, round_: int, rank: int) -> list[Problem]:
        """Returns further problems for one rank, to replace groups without a learning signal.

        Args:
            step: Number of the step, from 0.
            count: Number of problems, for this rank.
            round_: Number of the resampling round within the step.
            rank: The rank that asks.
        """
        ...

    def observe(self, reward: float) -> None:
        """Takes note of a step's mean reward over all ranks."""
        ...

    def state(self) -> dict[str, Any]:
        """Returns the state that a checkpoint keeps, as JSON values."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores the state that `state` returned."""
        ...


class Epochs:
    """Chooses every problem once per epoch, in a new order in each epoch."""

    def __init__(self, task: Task, seed: int) -> None:
        self._task, self._seed = task, seed

    def choose(self, step: int, count: int) -> list[Problem]:
        """Returns the next ``count`` problems of the epoch."""
        return self._task.batch(step, count)

    def more(self, step: int, count: int, round_: int, rank: int) -> list[Problem]:
        """Returns problems at random, without regard to the epoch."""
        rng = random.Random(f"{self._seed}/more/{step}/{round_}/{rank}")
        return self._task.take(shuffled(len(self._task.rows), rng), count)

    def observe(self, reward: float) -> None:
        """Does nothing: the order does not depend on rewards."""

    def state(self) -> dict[str, Any]:
        """Returns an empty state."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """Does nothing: there is no state."""


class Curriculum:
    """Chooses the problems whose difficulty is nearest to a target that follows the reward.

    AdaRFT (Shi et al., arXiv 2504.05520): T ← clip(T + η tanh(α (reward − β)), easiest, hardest). Among
    problems at equal distance, each step chooses anew at random.

    Args:
        task: Problems with difficulties.
        seed: Seed of the choice among problems at equal distance.
        config: Initial T, and η, α and β.

    Attributes:
        target: T, the current target difficulty.
    """

    def __init__(self, task: Task, seed: int, config: CurriculumConfig) -> None:
        self._task, self._seed, self._config = task, seed, config
        difficulties = task.difficulties
        self._positions = np.argsort(difficulties, kind="stable")
        self._levels, self._begins = np.unique(difficulties[self._positions], return_index=True)
        self._ends = np.append(self._begins[1:], len(difficulties))
        self._low, self._high = float(self._levels[0]), float(self._levels[-1])
        self.target = min(max(config.start, self._low), self._high)

    def choose(self, step: int, count: int) -> list[Problem]:
        """Returns the ``count`` problems with difficulties nearest to the target."""
        return self._task.take(self._nearest(f"{self._seed}/{step}"), count)

    def more(self, step: int, count: int, round_: int, rank: int) -> list[Problem]:
        """Returns problems with difficulties nearest to the target, drawn anew for each round and rank."""
        return self._task.take(self._nearest(f"{self._seed}/more/{step}/{round_}/{rank}"), count)

    def _nearest(self, seed: str) -> Iterator[int]:
        """Yields positions of problems, nearest difficulty first, those at equal distance in random order.

        The cost grows with the number of positions taken.
        """
        rng = random.Random(seed)
        above = int(np.searchsorted(self._levels, self.target))
        below = above - 1
        while below >= 0 or above < len(self._levels):
            distance_below = self.target - self._levels[below] if below >= 0 else math.inf
            distance_above = self._levels[above] - self.target if above < len(self._levels) else math.inf
            take_below, take_above = distance_below <= distance_above, distance_above <= distance_below
            levels = [level for level, nearest in ((below, take_below), (above, take_above)) if nearest]
            below, above = below - int(take_below), above + int(take_above)
            spans = [range(self._begins[level], self._ends[level]) for level in levels]
            first = len(spans[0])
            for i in shuffled(sum(map(len, spans)), rng):
                yield int(self._positions[spans[0][i] if i < first else spans[1][i - first]])

    def observe(self, reward: float) -> None:
        """Moves the target: up if the mean reward is above β, down if it is below."""
        excess = reward - self._config.reward
        target = self.target + self._config.step * math.tanh(self._config.sensitivity * excess)
        self.target = min(max(target, self._low), self._high)

    def state(self) -> dict[str, Any]:
        """Returns the target."""
        return {"target": self.target}

    def load_state(self, state: dict[str, Any]) -> None:
        """Restores the target."""
        self.target = float(state.get("target", self.target))


def create_prompt_sampler(task: Task, seed: int, config: CurriculumConfig | None) -> PromptSampler:
    """Returns a curriculum if the recipe has one, else epochs."""
    return Epochs(task, seed) if config is None else Curriculum(task, seed, config)
