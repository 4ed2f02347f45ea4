"""The drafter trained in idle time beside one that stays as it is: what training costs a step, and what it
brings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

from paceline.benchmarks.common.results import Keep, ignore
from paceline.benchmarks.common.runs import mean, quarters, train_recipe


@dataclass(frozen=True, slots=True)
class IdleRow:
    """One run.

    Attributes:
        schedule: ``drafter.schedule``.
        step: Mean seconds of a step, the first left out.
        rollout: Of its rollouts, the slowest rank's.
        training: Seconds of drafter training, all ranks and steps.
        inside: Share of them in which another rank was still decoding.
        on_path: Mean seconds of a step by which training delayed it.
        updates: Of the drafter.
        acceptance: Acceptance length by quarter of the run.
        reward: Mean reward by quarter.
        snapshot: Mean seconds that a snapshot of the drafter takes of a step which makes one.
        longer, longer_error: By how much a step is longer than the same one of the frozen run: mean of the
            pairs' differences as a share of the frozen run's mean step, and its standard error.
        update_longer: The same of the policy's update alone, the yardstick: training is over by then.
    """

    schedule: str
    step: float
    rollout: float
    training: float
    inside: float
    on_path: float
    updates: int
    acceptance: list[float]
    reward: list[float]
    snapshot: float = 0.0
    longer: float = 0.0
    longer_error: float = 0.0
    update_longer: float = 0.0


def compare_idle(
    config: Path,
    overrides: Sequence[str],
    start: Path,
    out: Path,
    ranks: int,
    say: Callable[[str], None],
    keep: Keep = ignore,
) -> list[IdleRow]:
    """Trains the recipe twice from the same policy, drafter and seed: drafter frozen, and trained on idle
    ranks.

    Raises:
        UserError: when a run fails, with its last line.
    """
    rows: list[IdleRow] = []
    frozen: list[dict[str, Any]] = []
    for schedule in ("never", "idle"):
        options = [
            *overrides,
            f"drafter.start={start}",
            f"drafter.schedule={schedule}",
            "measure.plain_every=0",
        ]
        metrics = train_recipe(config, options, out / schedule, ranks, say)
        frozen = frozen or metrics
        row = idle_row(schedule, metrics, frozen)
        say(
            f"{schedule}: a step {row.step:.2f} s, {row.updates} updates, {row.inside:.0%} of training in "
            "idle time"
        )
        say(f"{schedule}: acceptance length by quarter {', '.join(f'{a:.2f}' for a in row.acceptance)}")
        rows.append(row)
        keep(row)
    return rows


def idle_row(schedule: str, metrics: list[dict[str, Any]], frozen: list[dict[str, Any]]) -> IdleRow:
    """A run's row beside the frozen run's metrics, step by step; the first step is left out of times."""
    timed, beside = metrics[1:] or metrics, frozen[1:] or frozen
    training = sum(m["drafter/seconds"] for m in metrics) if schedule != "never" else 0.0
    longer, error = _paired(timed, beside, "time/step")
    return IdleRow(
        schedule=schedule,
        step=mean([m["time/step"] for m in timed]),
        rollout=mean([m["rollout/seconds"] for m in timed]),
        training=training,
        inside=sum(m["drafter/seconds_off_path"] for m in metrics) / training if training else 1.0,
        on_path=mean([m["drafter/seconds_on_path"] for m in timed]),
        updates=sum(m.get("drafter/updates", 0) for m in metrics),
        acceptance=quarters([m["rollout/acceptance_length"] for m in metrics]),
        reward=quarters([m["reward/mean"] for m in metrics]),
        snapshot=mean([s for m in metrics if (s := m["drafter/snapshot_seconds"]) > 0] or [0.0]),
        longer=longer,
        longer_error=error,
        update_longer=_paired(timed, beside, "time/update")[0],
    )


def _paired(metrics: list[dict[str, Any]], beside: list[dict[str, Any]], key: str) -> tuple[float, float]:
    """Mean difference as a share of the other run's mean, and its standard error."""
    differences = [a[key] - b[key] for a, b in zip(metrics, beside, strict=True)]
    scale = mean([b[key] for b in beside])
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return mean(differences) / scale, error / scale
