"""Compares finished runs of one recipe with different seeds: reward, its rise, speed and memory."""

from __future__ import annotations

import argparse
from pathlib import Path

from rich.table import Table

from paceline.benchmarks.common.results import Results
from paceline.rl.monitoring.summary import read_metrics, summarise
from paceline.rl.process.console import console
from paceline.rl.process.files import read_object
from paceline.rl.process.invocation import command_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("runs", nargs="+", type=Path, help="directories of finished runs")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/seeds.json"), help="JSON file of the results"
    )


def run(args: argparse.Namespace) -> None:
    """Prints a row per run and writes the runs' summaries."""
    table = Table(
        "run",
        "seed",
        "first quarter",
        "last quarter",
        "rise ÷ its standard error",
        "rollout ÷ plain",
        "peak GB",
    )
    records = []
    for path in args.runs:
        s = {"seed": read_object(path / "config.json")["seed"], **summarise(read_metrics(path))}
        records.append(s)
        values = (
            s["reward_before"],
            s["reward_after"],
            (s["reward_after"] - s["reward_before"]) / s["reward_rise_std_error"],
            s.get("rollout_speedup", float("nan")),
            s["peak_memory_gb"],
        )
        table.add_row(path.name, str(s["seed"]), *(f"{x:.3f}" for x in values))
    console().print(table)
    with Results(args.out, command_line()) as results:
        results.note(runs=records)
