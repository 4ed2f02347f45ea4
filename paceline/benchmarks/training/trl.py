"""Compares TRL's own generation with Paceline's rollouts in TRL's trainer: learning and time per step."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

from rich.table import Table

from paceline.benchmarks.common.results import Log, Results, RowCallback, ignore_row
from paceline.benchmarks.common.runs import mean, run_ranks
from paceline.rl.errors import UserError
from paceline.rl.process.console import console
from paceline.rl.process.invocation import command_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--config", default="configs/length/verbose.yaml", help="recipe of both runs")
    parser.add_argument(
        "--drafter", type=Path, default=Path("runs/quickstart-drafter"), help="initial drafter"
    )
    parser.add_argument("--ranks", type=int, default=2, help="ranks of each run")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/trl"), help="folder of the runs; finished ones are reused"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/trl"), help="JSON file of the results"
    )
    parser.add_argument("overrides", nargs="*", help="recipe overrides, key=value")


def run(args: argparse.Namespace) -> None:
    """Trains with both kinds of rollouts, where a run is missing, and prints the comparison."""
    with Results(args.out, command_line()) as results:
        rows, pair = compare_trl(
            args.config, args.drafter, args.runs, args.ranks, args.overrides, print, results.into("rows")
        )
        results.add("pair", pair)
    table = Table("rollouts", "steps", "step s", "generation s", "tokens", "reward, first and last half")
    for r in rows:
        half = len(r.rewards) // 2
        first, last = mean(r.rewards[:half]), mean(r.rewards[half:])
        table.add_row(
            r.rollouts,
            str(r.steps),
            f"{r.step:.1f}",
            f"{r.generation:.1f}",
            f"{r.tokens:.1f}",
            f"{first:.3f} → {last:.3f}",
        )
    terminal = console()
    terminal.print(table)
    terminal.print(
        f"step {pair.step_ratio:.2f}, at equal lengths {pair.equal_lengths:.2f} of at most {pair.limit:.2f}; "
        f"generation {pair.generation_ratio:.2f}, by token {pair.by_token:.2f}; "
        f"reward {pair.reward_difference:+.3f} ± {pair.reward_error:.3f}"
    )


@dataclass(frozen=True, slots=True)
class TrlRow:
    """Holds the results with one kind of rollouts: means over all steps but the first, which loads models.

    Attributes:
        rollouts: Kind of rollouts, ``trl`` or ``paceline``.
        steps: Number of steps that the means are over.
        step: Seconds of a step.
        generation: Seconds of a step's generation, including the drafter's training and weight exchange.
        tokens: Tokens per completion.
        rewards: Mean reward of each step, the first included.
    """

    rollouts: str
    steps: int
    step: float
    generation: float
    tokens: float
    rewards: list[float]


@dataclass(frozen=True, slots=True)
class TrlPair:
    """Holds the comparison of the two kinds of rollouts on the same prompts.

    Attributes:
        step_ratio: Seconds of a step with TRL's generation relative to Paceline's.
        generation_ratio: Seconds of generation with TRL relative to Paceline.
        by_token: Seconds of generation per token with TRL relative to Paceline, since lengths differ by
            chance.
        equal_lengths: Step ratio computed from TRL's run alone, its generation divided by ``by_token``.
        limit: Step ratio if rollouts took no time.
        reward_difference: Reward with Paceline minus reward with TRL, mean over steps.
        reward_error: Standard error of ``reward_difference``.
    """

    step_ratio: float
    generation_ratio: float
    by_token: float
    equal_lengths: float
    limit: float
    reward_difference: float
    reward_error: float


def compare_trl(
    config: str,
    drafter: Path,
    folder: Path,
    ranks: int,
    overrides: Sequence[str],
    log: Log,
    on_row: RowCallback = ignore_row,
) -> tuple[list[TrlRow], TrlPair]:
    """Trains a recipe's task in TRL with either kind of rollouts, where a run is missing.

    Args:
        config: Recipe of both runs.
        drafter: Directory of the initial drafter.
        folder: Folder of the runs; finished ones are reused.
        ranks: Number of ranks of each run.
        overrides: Recipe overrides of both runs.
        log: Receives lines about the runs.
        on_row: Called with each row once its run is there.

    Raises:
        UserError: The drafter is missing, or a run failed; see `run_ranks`.
    """
    rows = []
    for side in ("trl", "paceline"):
        out = folder / side
        if not (out / "steps.jsonl").is_file():
            if not drafter.is_dir():
                raise UserError(
                    f"--drafter {drafter}: no such directory; make it with: "
                    f"paceline warmup {config} --drafter {drafter}"
                )
            run_ranks(
                "paceline.benchmarks.training.trl_run",
                [config, "--rollouts", side, "--drafter", str(drafter), *overrides],
                out,
                ranks,
                log,
            )
        rows.append(_row(side, [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]))
        on_row(rows[-1])
    theirs, ours = rows
    by_token = theirs.generation / theirs.tokens / (ours.generation / ours.tokens)
    differences = [a - b for a, b in zip(ours.rewards, theirs.rewards, strict=True)]
    return rows, TrlPair(
        step_ratio=theirs.step / ours.step,
        generation_ratio=theirs.generation / ours.generation,
        by_token=by_token,
        equal_lengths=theirs.step / (theirs.step - theirs.generation + theirs.generation / by_token),
        limit=theirs.step / (theirs.step - theirs.generation),
        reward_difference=mean(differences),
        reward_error=stdev(differences) / len(differences) ** 0.5,
    )


def _row(side: str, steps: Sequence[dict[str, Any]]) -> TrlRow:
    later = steps[1:]
    return TrlRow(
        rollouts=side,
        steps=len(later),
        step=mean([s["seconds"] for s in later]),
        generation=mean([s["generation"] for s in later]),
        tokens=mean([s["completions/mean_length"] for s in later]),
        rewards=[s["reward"] for s in steps],
    )
