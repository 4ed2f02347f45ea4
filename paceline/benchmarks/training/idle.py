"""Compares a drafter trained on idle ranks with a frozen one: cost per step, and acceptance over time."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

from paceline.benchmarks.common.results import Log, Results, RowCallback, ignore_row
from paceline.benchmarks.common.runs import mean, quarters, step_mean, timed_steps, train_recipe
from paceline.rl.process.invocation import command_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--config", type=Path, required=True, help="recipe of both runs")
    parser.add_argument(
        "--start", type=Path, required=True, help="initial drafter, made by launch/warmup_drafter.py"
    )
    parser.add_argument("--ranks", type=int, default=2, help="ranks of each run")
    parser.add_argument("--runs", type=Path, default=Path("runs/idle"), help="folder of the two runs")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/idle"), help="JSON file of the results"
    )
    parser.add_argument("overrides", nargs="*", help="recipe overrides, key=value")


def run(args: argparse.Namespace) -> None:
    """Trains the recipe with both schedules and prints what drafter training costs a step."""
    with Results(args.out, command_line()) as results:
        frozen, trained = compare_idle(
            args.config, args.overrides, args.start, args.runs, args.ranks, print, results.into("rows")
        )
    print(
        f"step with training / without: {trained.step / frozen.step:.3f}; rollouts "
        f"{trained.rollout / frozen.rollout:.3f}"
    )
    print(
        f"paired by step: {trained.longer:+.1%} ± {trained.longer_error:.1%}; the update, which drafter "
        f"training does not affect: {trained.update_longer:+.1%}; a snapshot takes "
        f"{1e3 * trained.snapshot:.0f} ms of a step"
    )


@dataclass(frozen=True, slots=True)
class IdleRow:
    """Holds the results of one run.

    Attributes:
        schedule: Value of ``drafter.schedule``.
        step: Mean seconds of a step, the first left out.
        rollout: Mean seconds of a step's rollouts on the slowest rank, the first step left out.
        training: Seconds of drafter training over all ranks and steps.
        inside: Share of ``training`` during which another rank was still decoding.
        on_path: Mean seconds by which drafter training delayed a step.
        updates: Number of updates of the drafter.
        acceptance: Acceptance length by quarter of the run.
        reward: Mean reward by quarter of the run.
        snapshot: Mean seconds that a snapshot of the drafter takes in a step that makes one.
        longer: Difference of a step to the same step of the frozen run: mean over steps, as a share of the
            frozen run's mean step.
        longer_error: Standard error of ``longer``.
        update_longer: Difference of the policy's update alone, as a share likewise. Drafter training has
            ended by then, so this shows the drift of the machine.
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
    log: Log,
    on_row: RowCallback = ignore_row,
) -> list[IdleRow]:
    """Trains the recipe with a frozen drafter and with one trained on idle ranks, from the same start.

    Args:
        config: Recipe of both runs.
        overrides: Recipe overrides of both runs.
        start: Directory of the initial drafter.
        out: Folder of the two runs.
        ranks: Number of ranks of each run.
        log: Receives lines about the runs.
        on_row: Called with each row once its run has ended.

    Raises:
        UserError: A run failed; the message has its last line.
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
        metrics = train_recipe(config, options, out / schedule, ranks, log)
        frozen = frozen or metrics
        row = idle_row(schedule, metrics, frozen)
        log(
            f"{schedule}: a step {row.step:.2f} s, {row.updates} updates, {row.inside:.0%} of training in "
            "idle time"
        )
        log(f"{schedule}: acceptance length by quarter {', '.join(f'{a:.2f}' for a in row.acceptance)}")
        rows.append(row)
        on_row(row)
    return rows


def idle_row(schedule: str, metrics: list[dict[str, Any]], frozen: list[dict[str, Any]]) -> IdleRow:
    """Returns the row of a run, compared step by step with the frozen run.

    Args:
        schedule: Value of ``drafter.schedule``.
        metrics: Metrics of the run's steps; the first step is left out of times.
        frozen: Metrics of the frozen run's steps.
    """
    timed, beside = timed_steps(metrics), timed_steps(frozen)
    training = sum(m["drafter/seconds"] for m in metrics) if schedule != "never" else 0.0
    longer, error = _paired(timed, beside, "time/step")
    return IdleRow(
        schedule=schedule,
        step=step_mean(metrics, "time/step"),
        rollout=step_mean(metrics, "rollout/seconds"),
        training=training,
        inside=sum(m["drafter/seconds_off_path"] for m in metrics) / training if training else 1.0,
        on_path=step_mean(metrics, "drafter/seconds_on_path"),
        updates=sum(m.get("drafter/updates", 0) for m in metrics),
        acceptance=quarters([m["rollout/acceptance_length"] for m in metrics]),
        reward=quarters([m["reward/mean"] for m in metrics]),
        snapshot=mean([s for m in metrics if (s := m["drafter/snapshot_seconds"]) > 0] or [0.0]),
        longer=longer,
        longer_error=error,
        update_longer=_paired(timed, beside, "time/update")[0],
    )


def _paired(
    metrics: Sequence[dict[str, Any]], beside: Sequence[dict[str, Any]], key: str
) -> tuple[float, float]:
    """Returns the mean difference as a share of the other run's mean, and its standard error."""
    differences = [a[key] - b[key] for a, b in zip(metrics, beside, strict=True)]
    scale = mean([b[key] for b in beside])
    error = stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
    return mean(differences) / scale, error / scale
