"""Runs of one recipe with speculation and without, seed by seed: the same learning, and what of the rollouts'
ratio arrives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

from paceline.benchmarks.common.runs import mean, quarters
from paceline.rl.monitoring.summary import read_metrics


@dataclass(frozen=True, slots=True)
class LearningRow:
    """One run.

    Attributes:
        run: Its directory's name.
        reward, length: Means over the last quarter of its steps.
        rollout, step: Seconds of all its steps but the first.
    """

    run: str
    reward: float
    length: float
    rollout: float
    step: float


@dataclass(frozen=True, slots=True)
class SameLearning:
    """Runs in pairs.

    Attributes:
        reward_difference, reward_error: With speculation less without: mean over seeds, and its standard
            error.
        length_difference, length_error: Likewise, tokens.
        rollout_ratio, step_ratio: Seconds without ÷ with speculation, over all runs.
        bound: Step ratio that this rollout ratio would bring if all else took as long as without speculation
            (Amdahl).
        limit: Step ratio of rollouts that took no time.
    """

    reward_difference: float
    reward_error: float
    length_difference: float
    length_error: float
    rollout_ratio: float
    step_ratio: float
    bound: float
    limit: float


def learning_row(run: Path) -> LearningRow:
    """A finished run's row."""
    metrics = read_metrics(run)
    return LearningRow(
        run=run.name,
        reward=quarters([m["reward/mean"] for m in metrics])[-1],
        length=quarters([m["length/mean"] for m in metrics])[-1],
        rollout=sum(m["rollout/seconds"] for m in metrics[1:]),
        step=sum(m["time/step"] for m in metrics[1:]),
    )


def compare_learning(speculating: Sequence[LearningRow], plain: Sequence[LearningRow]) -> SameLearning:
    """Runs of the same seeds, in the same order; at least two of each."""
    reward, length = (
        _difference([getattr(r, n) for r in speculating], [getattr(r, n) for r in plain])
        for n in ("reward", "length")
    )
    rollouts, steps = sum(r.rollout for r in plain), sum(r.step for r in plain)
    ratio = rollouts / sum(r.rollout for r in speculating)
    return SameLearning(
        *reward,
        *length,
        rollout_ratio=ratio,
        step_ratio=steps / sum(r.step for r in speculating),
        bound=steps / (steps - rollouts + rollouts / ratio),
        limit=steps / (steps - rollouts),
    )


def _difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    pairs = [x - y for x, y in zip(a, b, strict=True)]
    return mean(pairs), stdev(pairs) / len(pairs) ** 0.5
