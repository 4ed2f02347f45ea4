"""Runs training jobs for the benchmarks, each in a process group of its own."""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paceline.benchmarks.common.results import Log
from paceline.rl.errors import UserError
from paceline.rl.monitoring.summary import read_metrics
from paceline.rl.process.progress import duration

_POLL_SECONDS = 0.5
_LOG_EVERY_SECONDS = 30.0


def train_recipe(
    config: Path, overrides: Sequence[str], out: Path, ranks: int, log: Log
) -> list[dict[str, Any]]:
    """Trains a recipe as ``paceline train`` does and returns the metrics of its steps.

    Raises:
        UserError: The run failed; the message is the run's own error, or its last line.
    """
    run_ranks("paceline.cli.rank", [str(config), *overrides], out, ranks, log)
    return read_metrics(out)


def run_ranks(module: str, arguments: Sequence[str], out: Path, ranks: int, log: Log) -> None:
    """Runs a module under torchrun until it ends and logs its progress.

    Args:
        module: Module that each rank runs, as ``python -m`` names it.
        arguments: Arguments of the module, without ``out``.
        out: Directory of the run.
        ranks: Number of ranks on this machine.
        log: Receives a line at the start and every 30 seconds.

    Raises:
        UserError: The run failed; the message is the run's own error, or its last line.
    """
    with tempfile.TemporaryFile("w+") as errors:
        job = subprocess.Popen(
            [*_launcher(module, ranks), *arguments, f"out={out}"], stdout=subprocess.DEVNULL, stderr=errors
        )
        log(f"training {out}")
        try:
            _watch(job, out, log)
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


def _watch(job: subprocess.Popen[bytes], out: Path, log: Log) -> None:
    """Waits for a run to end and logs how many steps its metrics file holds."""
    last_log, began = time.monotonic(), time.monotonic()
    while job.poll() is None:
        time.sleep(_POLL_SECONDS)
        now = time.monotonic()
        if now - last_log >= _LOG_EVERY_SECONDS:
            last_log = now
            metrics = next((p for p in (out / "metrics.jsonl", out / "steps.jsonl") if p.is_file()), None)
            steps = metrics.read_bytes().count(b"\n") if metrics is not None else 0
            log(f"  {out}: {f'step {steps} done' if steps else 'starting'}, {duration(now - began)}")


def finished_run(
    config: Path, overrides: Sequence[str], out: Path, ranks: int, log: Log
) -> list[dict[str, Any]]:
    """Returns the metrics of the finished run in ``out``, or trains it first with `train_recipe`."""
    if (out / "summary.json").is_file():
        return read_metrics(out)
    return train_recipe(config, overrides, out, ranks, log)


def timed_steps(metrics: Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
    """Returns a run's steps without the first, which pays for set-up; a run of one step as it is."""
    return metrics[1:] or metrics


def step_mean(metrics: Sequence[dict[str, Any]], key: str) -> float:
    """Returns the mean of a metric over a run's `timed_steps`."""
    return mean([m[key] for m in timed_steps(metrics)])


def quarters(values: Sequence[float]) -> list[float]:
    """Returns the means of four equal parts."""
    size = max(len(values) // 4, 1)
    return [mean(values[at : at + size]) for at in range(0, 4 * size, size) if values[at : at + size]]


def mean(values: Sequence[float]) -> float:
    """Returns the arithmetic mean."""
    return sum(values) / len(values)


def deadline_passed(end: float) -> bool:
    """Returns whether the clock of `time.perf_counter` has reached ``end``."""
    return time.perf_counter() >= end
