"""Trains a 25 M reasoner from scratch on one GPU, then runs GRPO plainly and adaptively, end to end.

Completions have up to 4096 tokens. The result is how much of the rollouts' speed-up is left in a whole step,
beside Amdahl's bound.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from paceline.benchmarks.common.results import Log, Results, RowCallback, ignore_row
from paceline.benchmarks.common.runs import quarters, step_mean, train_recipe
from paceline.rl.process.invocation import command_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument(
        "--config", type=Path, default=Path("configs/gpu_rl.yaml"), help="recipe of both runs"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/gpu-rl"), help="folder of the two runs")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/gpu_rl.json"), help="JSON file of the results"
    )
    parser.add_argument("overrides", nargs="*", help="recipe overrides, key=value")


def run(args: argparse.Namespace) -> None:
    """Trains the recipe plainly and adaptively and prints the ratios of rollouts and steps."""
    with Results(args.out, command_line()) as results:
        plain, adaptive = compare_speculation(
            args.config, args.overrides, args.runs, print, results.into("runs")
        )
        ratios = {"rollout": plain.rollout / adaptive.rollout, "step": plain.step / adaptive.step}
        bound = plain.step / (plain.step - plain.rollout)
        results.note(ratios=ratios, bound=bound)
    for times in (plain, adaptive):
        print(times)
    print(
        f"rollout {ratios['rollout']:.2f}x, whole step {ratios['step']:.2f}x of at most {bound:.2f}x (Amdahl)"
    )


@dataclass(frozen=True, slots=True)
class RunTimes:
    """Holds the results of one run: mean seconds of its steps, the first left out, and its reward.

    Attributes:
        strategy: Value of ``speculation.strategy``.
        rollout: Seconds of a step's rollouts on the slowest rank.
        step: Seconds of a whole step.
        reward: Mean reward over the last quarter of the steps.
        acceptance_length: Mean acceptance length of the rollouts.
        length_max: Tokens of the longest completion.
    """

    strategy: str
    rollout: float
    step: float
    reward: float
    acceptance_length: float
    length_max: int


def compare_speculation(
    config: Path, overrides: Sequence[str], out: Path, log: Log, on_row: RowCallback = ignore_row
) -> list[RunTimes]:
    """Trains the recipe plainly and adaptively, from the same policy and seed.

    Args:
        config: Recipe of both runs.
        overrides: Recipe overrides of both runs.
        out: Folder of the two runs.
        log: Receives lines about the runs.
        on_row: Called with each row once its run has ended.

    Raises:
        UserError: A run failed; the message has its last line.
    """
    rows = []
    for strategy in ("plain", "adaptive"):
        rows.append(_train(config, [*overrides, "measure.plain_every=0"], strategy, out / strategy, log))
        on_row(rows[-1])
    return rows


def _train(config: Path, overrides: Sequence[str], strategy: str, out: Path, log: Log) -> RunTimes:
    ranks = max(torch.cuda.device_count(), 1)
    metrics = train_recipe(config, [*overrides, f"speculation.strategy={strategy}"], out, ranks, log)
    return RunTimes(
        strategy=strategy,
        rollout=step_mean(metrics, "rollout/seconds"),
        step=step_mean(metrics, "time/step"),
        reward=quarters([m["reward/mean"] for m in metrics])[-1],
        acceptance_length=step_mean(metrics, "rollout/acceptance_length"),
        length_max=max(m["length/max"] for m in metrics),
    )
