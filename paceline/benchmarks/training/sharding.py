"""Trains one recipe in every sharding mode and compares loss curves, time to gather weights, and memory."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from paceline.benchmarks.common.results import Log, Results, RowCallback, ignore_row
from paceline.benchmarks.common.runs import mean, step_mean, timed_steps, train_recipe
from paceline.rl.process.invocation import command_line

SHARDING_MODES = {
    "replicated": (),
    **{f"ZeRO {stage}": (f"scale.deepspeed=configs/deepspeed/zero{stage}.json",) for stage in range(4)},
    "FSDP2": ("scale.fsdp2=true",),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--config", type=Path, required=True, help="recipe of every run")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--ranks", type=int, default=2, help="ranks of each run")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/sharding"), help="JSON file of the results"
    )
    parser.add_argument("overrides", nargs="*", help="recipe overrides, key=value")


def run(args: argparse.Namespace) -> None:
    """Trains the recipe in every sharding mode and writes the results."""
    with Results(args.out, command_line()) as results:
        compare_sharding(args.config, args.overrides, args.runs, args.ranks, print, results.into("rows"))


@dataclass(frozen=True, slots=True)
class ShardingRow:
    """Holds the results of one sharding mode.

    Attributes:
        way: Name of the mode in `SHARDING_MODES`.
        losses: Loss of each step's update.
        loss_gap: Largest difference of a step's loss to that of the replicated run.
        gather: Mean seconds per step to gather weights for the engine, the first step left out.
        update: Mean seconds of a step's update, the first left out.
        step: Mean seconds of a step, the first left out.
        peak_gb: Peak memory of all ranks, in gigabytes.
        logprob_gap: Largest difference between the engine's and the trainer's log-prob of a token, in nats.
    """

    way: str
    losses: list[float]
    loss_gap: float
    gather: float
    update: float
    step: float
    peak_gb: float
    logprob_gap: float


def compare_sharding(
    config: Path,
    overrides: Sequence[str],
    out: Path,
    ranks: int,
    log: Log,
    on_row: RowCallback = ignore_row,
) -> list[ShardingRow]:
    """Trains the recipe in every sharding mode, from the same policy and seed.

    Args:
        config: Recipe of every run.
        overrides: Recipe overrides of every run.
        out: Folder of the runs.
        ranks: Number of ranks of each run.
        log: Receives lines about the runs.
        on_row: Called with each row once its run has ended.

    Raises:
        UserError: A run failed; the message has its last line.
    """
    rows: list[ShardingRow] = []
    for mode, options in SHARDING_MODES.items():
        folder = out / mode.lower().replace(" ", "")
        metrics = train_recipe(config, [*overrides, *options], folder, ranks, log)
        losses = [m["update/loss"] for m in metrics]
        first = rows[0].losses if rows else losses
        row = ShardingRow(
            way=mode,
            losses=losses,
            loss_gap=max(abs(a - b) for a, b in zip(losses, first, strict=True)),
            gather=mean([m.get("time/gather", 0.0) for m in timed_steps(metrics)]),
            update=step_mean(metrics, "time/update"),
            step=step_mean(metrics, "time/step"),
            peak_gb=max(m["memory/peak_gb"] for m in metrics),
            logprob_gap=max(m["engine/logprob_gap_max"] for m in metrics),
        )
        log(
            f"{mode}: loss within {row.loss_gap:.1e}, gather {row.gather:.2f} s, update {row.update:.2f} s, "
            f"{row.peak_gb:.1f} GB"
        )
        rows.append(row)
        on_row(row)
    return rows
