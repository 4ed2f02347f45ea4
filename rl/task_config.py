"""The task section of a recipe. Apart from the others because scoring processes read it: they need no torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class DatasetConfig:
    """One reasoning-gym data set: its name, its share of the problems, its own parameters, and how difficult they make it, on a
    scale of the recipe's own, for ``task.curriculum``."""

    name: str = ""
    weight: float = 1.0
    params: dict[str, Any] = field(default_factory=dict)
    difficulty: float = 0.0


@dataclass(frozen=True, slots=True)
class CurriculumConfig:
    """Problems about as difficult as the policy can bear (AdaRFT): the target rises while the reward is above ``reward``.

    Attributes:
        start: Difficulty at first.
        step: The most that it moves in a step (η).
        sensitivity: How sharply it follows the reward (α).
        reward: Mean reward to keep to (β).
    """

    start: float = 0.0
    step: float = 1.0
    sensitivity: float = 2.0
    reward: float = 0.5


@dataclass(frozen=True, slots=True)
class TaskConfig:
    """Where problems come from.

    Attributes:
        source: ``reasoning_gym`` (``datasets``, ``size``) or ``jsonl`` (``path``; lines with "prompt" and "answer").
        datasets: Mixture of reasoning-gym data sets.
        size: Problems in an epoch.
        path: JSONL file.
        curriculum: Chooses problems by difficulty (data sets' ``difficulty``, or a "difficulty" on each line of the JSONL); null
            asks all in epochs.
        instruction: Appended to each question.
        system: System message, for policies with a chat template; null leaves the template's own.
        reward: ``module:function`` in TRL's reward signature; null takes each problem's own scorer.
        score_workers: Processes of a rank that score.
        score_seconds: Longest that scoring a completion may take.
        score_deadline: Longest that a step waits for scores once its rollouts are over, in seconds.
        score_failed: Reward where scoring took too long or failed.
    """

    source: Literal["reasoning_gym", "jsonl"] = "reasoning_gym"
    datasets: tuple[DatasetConfig, ...] = ()
    size: int = 1000
    path: str | None = None
    curriculum: CurriculumConfig | None = None
    instruction: str = ""
    system: str | None = None
    reward: str | None = None
    score_workers: int = 1
    score_seconds: float = 10.0
    score_deadline: float = 60.0
    score_failed: float = 0.0
