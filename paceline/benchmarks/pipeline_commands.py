"""Benchmarks in other people's pipelines."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from paceline.rl.process.invocation import command_line


def compare_trl(args: argparse.Namespace) -> None:
    """TRL's own generation, and ours in TRL."""
    from rich.table import Table

    from paceline.benchmarks.common.results import Results
    from paceline.benchmarks.training.trl import compare_trl
    from paceline.rl.process.console import console

    with Results(args.out, command_line()) as results:
        keep = results.into("rows")
        rows, pair = compare_trl(
            str(args.config), args.drafter, args.runs, args.ranks, args.overrides, print, keep
        )
        results.add("pair", pair)
    table = Table("rollouts", "steps", "step s", "generation s", "tokens", "reward, first and last half")
    for r in rows:
        half = len(r.rewards) // 2
        halves = [sum(part) / len(part) for part in (r.rewards[:half], r.rewards[half:])]
        table.add_row(
            r.rollouts,
            str(r.steps),
            f"{r.step:.1f}",
            f"{r.generation:.1f}",
            f"{r.tokens:.1f}",
            f"{halves[0]:.3f} → {halves[1]:.3f}",
        )
    terminal = console()
    terminal.print(table)
    terminal.print(
        f"step {pair.step_ratio:.2f}, at equal lengths {pair.equal_lengths:.2f} of at most {pair.limit:.2f}; "
        f"generation {pair.generation_ratio:.2f}, by token {pair.by_token:.2f}; "
        f"reward {pair.reward_difference:+.3f} ± {pair.reward_error:.3f}"
    )


PIPELINE_COMMANDS: dict[str, Callable[[argparse.Namespace], Any]] = {"trl": compare_trl}
