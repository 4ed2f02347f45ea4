"""Compares length-aware rewards with plain GRPO on one task, seed by seed: accuracy and length."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

from rich.table import Table

from paceline.benchmarks.common.results import Log, Results, RowCallback, ignore_row
from paceline.benchmarks.common.runs import finished_run, mean, quarters
from paceline.rl.process.console import console
from paceline.rl.process.invocation import command_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    folder = Path("configs/length")
    rewards = sorted((folder / "rewards").glob("*.yaml"))
    parser.add_argument("--base", type=Path, default=folder / "verbose.yaml", help="recipe of plain GRPO")
    parser.add_argument(
        "--recipes", type=Path, nargs="+", default=rewards, help="recipes with a length-aware reward"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="at least two")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/lengths"), help="folder of the runs; finished ones are reused"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/lengths"), help="JSON file of the results"
    )


def run(args: argparse.Namespace) -> None:
    """Trains what is missing and prints a row per recipe."""
    with Results(args.out, command_line()) as results:
        rows = compare_rewards(args.recipes, args.base, args.seeds, args.runs, print, results.into("rows"))
    table = Table(
        "recipe", "accuracy", "minus plain GRPO", "length", "÷ plain GRPO", "entropy", "seconds per step"
    )
    for r in rows:
        table.add_row(
            r.recipe,
            f"{r.accuracy:.3f}",
            f"{r.accuracy_change:+.3f} ± {r.accuracy_error:.3f}",
            f"{r.length:.1f}",
            f"{r.length_ratio:.2f}",
            f"{r.entropy:.3f}",
            f"{r.step:.1f}",
        )
    console().print(table)


@dataclass(frozen=True, slots=True)
class RewardRow:
    """Holds the results of a recipe over its seeds; means are over the last quarter of the steps.

    Attributes:
        recipe: File name of the recipe, without its suffix.
        accuracy: Share of correct completions, mean over seeds.
        length: Tokens per completion, mean over seeds.
        accuracy_change: Accuracy minus that of plain GRPO with the same seeds, mean over seeds.
        accuracy_error: Standard error of ``accuracy_change`` over seeds.
        length_ratio: Length relative to plain GRPO.
        entropy: Entropy per token, in nats.
        step: Seconds per step; the load of the machine varied between runs.
        seeds: Accuracy and length of each seed.
    """

    recipe: str
    accuracy: float
    length: float
    accuracy_change: float
    accuracy_error: float
    length_ratio: float
    entropy: float
    step: float
    seeds: list[tuple[float, float]]


def compare_rewards(
    recipes: Sequence[Path],
    base: Path,
    seeds: Sequence[int],
    folder: Path,
    log: Log,
    on_row: RowCallback = ignore_row,
) -> list[RewardRow]:
    """Trains plain GRPO and each recipe, where a run is missing, and returns their rows.

    Args:
        recipes: Recipes with a length-aware reward.
        base: Recipe of plain GRPO.
        seeds: Seeds of each recipe, at least two.
        folder: Folder of the runs; finished ones are reused.
        log: Receives lines about training runs.
        on_row: Called with each row once its runs are there.
    """
    plain: list[list[float]] = []
    rows = []
    for recipe in (base, *recipes):
        metrics = [
            finished_run(recipe, [f"seed={seed}"], folder / f"{recipe.stem}-{seed}", 1, log) for seed in seeds
        ]
        names = ("reward/exact", "length/mean", "update/entropy", "time/step")
        runs = [[quarters([m[name] for m in run])[-1] for name in names] for run in metrics]
        plain = plain or runs
        rows.append(_row(recipe.stem, runs, plain))
        on_row(rows[-1])
    return rows


def _row(recipe: str, runs: Sequence[Sequence[float]], plain: Sequence[Sequence[float]]) -> RewardRow:
    """Returns a recipe's row from the accuracy, length, entropy and step seconds of each seed."""
    changes = [run[0] - other[0] for run, other in zip(runs, plain, strict=True)]
    accuracy, length, entropy, step = (mean([run[i] for run in runs]) for i in range(4))
    return RewardRow(
        recipe=recipe,
        accuracy=accuracy,
        length=length,
        accuracy_change=mean(changes),
        accuracy_error=stdev(changes) / len(changes) ** 0.5,
        length_ratio=length / mean([run[1] for run in plain]),
        entropy=entropy,
        step=step,
        seeds=[(run[0], run[1]) for run in runs],
    )
