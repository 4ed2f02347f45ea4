"""Runs of the main job for benchmarks, each a process group of its own."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rl.errors import UserError
from rl.summary import read_metrics


def train_recipe(config: Path, overrides: Sequence[str], out: Path, ranks: int) -> list[dict[str, Any]]:
    """Trains a recipe with ``launch/train.py`` and returns the metrics of its steps.

    Raises:
        UserError: when the run fails, with what it said itself, or its last line.
    """
    run_ranks("train.py", [str(config), *overrides], out, ranks)
    return read_metrics(out)


def run_ranks(script: str, arguments: Sequence[str], out: Path, ranks: int) -> None:
    """A script of launch/ under torchrun, to its end.

    Args:
        script: Its name.
        arguments: Of it, but ``out``.
        out: The run's directory.
        ranks: On this machine.

    Raises:
        UserError: when it fails, with what it said itself, or its last line.
    """
    path = Path(__file__).parents[1] / "launch" / script
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    result = subprocess.run([*launcher, str(path), *arguments, f"out={out}"], capture_output=True, text=True, check=False)
    if result.returncode != 0:
        lines = result.stderr.strip().splitlines() or ["no message"]
        own = [line.removeprefix("paceline: ") for line in lines if line.startswith("paceline: ")]
        raise UserError(f"the run {out} failed: {(own or lines[-1:])[0]}")


def finished_run(config: Path, overrides: Sequence[str], out: Path, ranks: int, say: Callable[[str], None]) -> list[dict[str, Any]]:
    """The same, unless ``out`` is already there and finished."""
    if (out / "summary.json").is_file():
        return read_metrics(out)
    say(f"training {out}")
    return train_recipe(config, overrides, out, ranks)


def quarters(values: Sequence[float]) -> list[float]:
    """Means of four equal parts."""
    size = max(len(values) // 4, 1)
    return [mean(values[at : at + size]) for at in range(0, 4 * size, size) if values[at : at + size]]


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def is_over(end: float) -> bool:
    """Whether the clock of `time.perf_counter` has come to ``end``."""
    return time.perf_counter() >= end
