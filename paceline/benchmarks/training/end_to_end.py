"""The main job with speculation and without: what of the rollout's ratio arrives at the end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from paceline.benchmarks.common.results import Keep, ignore
from paceline.benchmarks.common.runs import Say, mean, quarters, train_recipe


@dataclass(frozen=True, slots=True)
class RunTimes:
    """Mean seconds of one run's steps, the first left out, and its reward.

    Attributes:
        strategy: ``speculation.strategy``.
        rollout: The slowest rank's rollouts.
        step: The whole step.
        reward: Mean of the last quarter.
        acceptance_length: Of the rollouts.
        length_max: Longest completion.
    """

    strategy: str
    rollout: float
    step: float
    reward: float
    acceptance_length: float
    length_max: int


def compare_speculation(
    config: Path, overrides: Sequence[str], out: Path, say: Say, keep: Keep = ignore
) -> list[RunTimes]:
    """Trains the recipe plainly and adaptively, from the same policy and seed.

    Raises:
        UserError: when a run fails, with its last line.
    """
    rows = []
    for strategy in ("plain", "adaptive"):
        rows.append(_train(config, [*overrides, "measure.plain_every=0"], strategy, out / strategy, say))
        keep(rows[-1])
    return rows


def _train(config: Path, overrides: Sequence[str], strategy: str, out: Path, say: Say) -> RunTimes:
    ranks = max(torch.cuda.device_count(), 1)
    metrics = train_recipe(config, [*overrides, f"speculation.strategy={strategy}"], out, ranks, say)
    timed = metrics[1:] or metrics
    return RunTimes(
        strategy=strategy,
        rollout=mean([m["rollout/seconds"] for m in timed]),
        step=mean([m["time/step"] for m in timed]),
        reward=quarters([m["reward/mean"] for m in metrics])[-1],
        acceptance_length=mean([m["rollout/acceptance_length"] for m in timed]),
        length_max=max(m["length/max"] for m in metrics),
    )
