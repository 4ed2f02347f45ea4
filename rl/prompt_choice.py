"""Which problems a step asks: in epochs, or those that are about as hard as the policy can bear."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any, Protocol

from rl.task_config import CurriculumConfig
from rl.tasks import Problem, Task


class PromptChoice(Protocol):
    """Every rank chooses alike: from the step, the seed and what all ranks have observed.

    Attributes:
        problems: All of them.
    """

    problems: list[Problem]

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
        self.problems, self._task, self._seed = task.problems, task, seed

    def choose(self, step: int, count: int) -> list[Problem]:
        return self._task.batch(step, count)

    def more(self, step: int, count: int, round_: int, rank: int) -> list[Problem]:
        chance = random.Random(f"{self._seed}/more/{step}/{round_}/{rank}")
        return chance.sample(self.problems, min(count, len(self.problems)))

    def observe(self, reward: float) -> None:
        """The order does not depend on it."""

    def state(self) -> dict[str, Any]:
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """There is none."""


class Curriculum:
    """The problems whose difficulty is nearest to a target that follows the reward (AdaRFT, Shi et al., arXiv 2504.05520):
    T ← clip(T + η tanh(α (reward − β)), easiest, hardest). Among those equally near, chance decides anew in every step.

    Args:
        task: Problems with difficulties.
        seed: Of the choice among equals.
        config: T at first, η, α and β.
    """

    def __init__(self, task: Task, seed: int, config: CurriculumConfig) -> None:
        self.problems, self._seed, self._config = task.problems, seed, config
        self._low = min(p.difficulty for p in task.problems)
        self._high = max(p.difficulty for p in task.problems)
        self.target = min(max(config.start, self._low), self._high)

    def choose(self, step: int, count: int) -> list[Problem]:
        return self._nearest(f"{self._seed}/{step}", count)

    def more(self, step: int, count: int, round_: int, rank: int) -> list[Problem]:
        return self._nearest(f"{self._seed}/more/{step}/{round_}/{rank}", min(count, len(self.problems)))

    def _nearest(self, seed: str, count: int) -> list[Problem]:
        chance = random.Random(seed)
        keyed: Sequence[tuple[float, float, int]] = sorted(
            (abs(p.difficulty - self.target), chance.random(), i) for i, p in enumerate(self.problems)
        )
        return [self.problems[i] for _, _, i in keyed[:count]]

    def observe(self, reward: float) -> None:
        moved = self.target + self._config.step * math.tanh(self._config.sensitivity * (reward - self._config.reward))
        self.target = min(max(moved, self._low), self._high)

    def state(self) -> dict[str, Any]:
        return {"target": self.target}

    def load_state(self, state: dict[str, Any]) -> None:
        self.target = float(state.get("target", self.target))


def prompt_choice(task: Task, seed: int, config: CurriculumConfig | None) -> PromptChoice:
    """As the recipe has it."""
    return Epochs(task, seed) if config is None else Curriculum(task, seed, config)
