"""Runs of the main job for benchmarks, each a process group of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paceline.rl.errors import UserError
from paceline.rl.monitoring.summary import read_metrics
from paceline.rl.process.progress import duration

_POLL = 0.5  # seconds
_BETWEEN_LINES = 30.0  # seconds
Say = Callable[[str], None]


def train_recipe(
    config: Path, overrides: Sequence[str], out: Path, ranks: int, say: Say
) -> list[dict[str, Any]]:
    """Trains a recipe as ``paceline train`` does and returns the metrics of its steps.

    Raises:
        UserError: when the run fails, with what it said itself, or its last line.
    """
    run_ranks("paceline.cli.rank", [str(config), *overrides], out, ranks, say)
    return read_metrics(out)


def run_ranks(module: str, arguments: Sequence[str], out: Path, ranks: int, say: Say) -> None:
    """Runs a module under torchrun to its end, and says now and then how far it is.

    Args:
        module: What each rank runs, as ``python -m`` names it.
        arguments: Its arguments, except ``out``.
        out: The run's directory.
        ranks: On this machine.
        say: Takes a line at the beginning and every half a minute.

    Raises:
        UserError: when it fails, with what it said itself, or its last line.
    """
    with tempfile.TemporaryFile("w+") as errors:
        job = subprocess.Popen(
            [*_launcher(module, ranks), *arguments, f"out={out}"], stdout=subprocess.DEVNULL, stderr=errors
        )
        say(f"training {out}")
        try:
            _watch(job, out, say)
        finally:
            if job.poll() is None:
                job.terminate()
                job.wait()
        if job.returncode == 0:
            return
        errors.seek(0)
        lines = errors.read().strip().splitlines() or ["no message"]
    own = [line.removeprefix("paceline: ") for line in lines if line.startswith("paceline: ")]
    raise UserError(f"the run {out} failed: {(own or lines[-1:])[0]}")


def _launcher(module: str, ranks: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        str(ranks),
        "-m",
        module,
    ]


def _watch(job: subprocess.Popen[bytes], out: Path, say: Say) -> None:
    """Waits for a run, and says now and then which step it has done, by the lines of its metrics."""
    said, began = time.monotonic(), time.monotonic()
    while job.poll() is None:
        time.sleep(_POLL)
        now = time.monotonic()
        if now - said >= _BETWEEN_LINES:
            said = now
            metrics = next((p for p in (out / "metrics.jsonl", out / "steps.jsonl") if p.is_file()), None)
            done = metrics.read_bytes().count(b"\n") if metrics is not None else 0
            say(f"  {out}: {f'step {done} done' if done else 'starting'}, {duration(now - began)}")


def finished_run(
    config: Path, overrides: Sequence[str], out: Path, ranks: int, say: Say
) -> list[dict[str, Any]]:
    """Trains a recipe as `train_recipe` does, unless ``out`` is already there and finished."""
    if (out / "summary.json").is_file():
        return read_metrics(out)
    return train_recipe(config, overrides, out, ranks, say)


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
