"""The main job with speculation and without: what of the rollout's ratio arrives at the end."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from rl.errors import UserError
from rl.summary import PHASES, read_metrics


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


def compare_speculation(config: Path, overrides: Sequence[str], out: Path) -> list[RunTimes]:
    """Trains the recipe plainly and adaptively, from the same policy and seed.

    Raises:
        UserError: when a run fails, with its last line.
    """
    return [_train(config, [*overrides, "measure.plain_every=0"], strategy, out / strategy) for strategy in ("plain", "adaptive")]


def _train(config: Path, overrides: Sequence[str], strategy: str, out: Path) -> RunTimes:
    ranks = max(torch.cuda.device_count(), 1)
    root = Path(__file__).parents[1]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [
        *launcher,
        str(root / "launch" / "train.py"),
        str(config),
        *overrides,
        f"speculation.strategy={strategy}",
        f"out={out}",
    ]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        raise UserError(f"the {strategy} run failed: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
    metrics = read_metrics(out)
    timed = metrics[1:] or metrics
    steps = [sum(m.get(f"time/{p}", 0.0) for p in PHASES if p != "measure") for m in timed]
    last = metrics[-max(len(metrics) // 4, 1) :]
    return RunTimes(
        strategy=strategy,
        rollout=_mean([m["rollout/seconds"] for m in timed]),
        step=_mean(steps),
        reward=_mean([m["reward/mean"] for m in last]),
        acceptance_length=_mean([m["rollout/acceptance_length"] for m in timed]),
        length_max=max(m["length/max"] for m in metrics),
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
