"""Implements the command that trains: it starts a process per rank and forwards Ctrl-C and SIGTERM."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import FrameType
from typing import Annotated

from typer import Argument, Option

from paceline.cli.common import Overrides
from paceline.cli.rank import rank_command
from paceline.rl.checkpointing.graceful_stop import SAME_SIGNAL_SECONDS, STOP_SIGNALS, announce_stop
from paceline.rl.errors import UserError, user_errors
from paceline.rl.process.console import announce


def train(
    config: Annotated[
        str | None,
        Argument(help="Recipe: a file, or the name of a packaged one; leave it out with --resume."),
    ] = None,
    overrides: Overrides = None,
    ranks: Annotated[
        int, Option(help="Processes on this machine; for several machines use torchrun launch/train.py.")
    ] = 1,
    dry_run: Annotated[
        bool,
        Option("--dry-run", help="Check the recipe and print its memory and time, without training."),
    ] = False,
    gpu: Annotated[
        float | None,
        Option(metavar="GB", help="With --dry-run: memory of each rank's GPU; by default this machine's."),
    ] = None,
    resume: Annotated[Path | None, Option(help="Directory of a run to continue.")] = None,
) -> None:
    """Trains a recipe's policy.

    Ctrl-C or SIGTERM stops the run after the current step with a checkpoint to resume from; a second one
    stops it immediately.

    --resume RUN key=value continues a run with other values of keys that may change, such as steps.
    """
    with user_errors():
        if resume is not None and config is not None and "=" in config:
            overrides, config = [config, *(overrides or ())], None
        if (config is None) == (resume is None):
            raise UserError("train: name either a recipe or --resume RUN")
        if ranks < 1:
            raise UserError(f"train: --ranks is {ranks}: write at least 1")
        arguments = list(overrides or ()) if config is None else [config, *(overrides or ())]
        options = [
            *(["--dry-run"] if dry_run else []),
            *(["--resume", str(resume)] if resume is not None else []),
        ]
        announce(f"reading the recipe {config}" if resume is None else f"resuming {resume}")
        run = _run_directory(config, overrides, resume)  # reports wrong keys before any rank starts
        if dry_run:
            from paceline.rl.run import run as run_here

            size = [] if gpu is None else ["--gpu", str(gpu)]
            run_here([*arguments, *options, "--ranks", str(ranks), *size])
        elif ranks == 1:
            os.execv(sys.executable, rank_command(1, [*arguments, *options]))
        else:
            raise SystemExit(_launch(ranks, [*arguments, *options], run))


def _run_directory(config: str | None, overrides: list[str] | None, resume: Path | None) -> Path:
    """Returns the run's directory: that of ``--resume``, or the recipe's ``out``.

    The ranks check the recipe's values: the checks need torch, which takes seconds to import, and which the
    ranks import anyway.
    """
    from paceline.rl.recipe import read_config

    if resume is not None:
        return resume
    assert config is not None
    return Path(read_config(config, overrides or ()).out)


def _launch(ranks: int, arguments: list[str], run: Path) -> int:
    """Runs the ranks under torchrun and returns the exit status.

    The ranks have a session of their own, so that the terminal's Ctrl-C reaches only this process, which asks
    them to stop through a file. With a signal, torchrun would kill them after half a minute. The ranks end
    with this process, however it ends.

    Args:
        ranks: Number of ranks.
        arguments: Arguments of launch/train.py.
        run: The run's directory.
    """
    job = subprocess.Popen(rank_command(ranks, arguments), start_new_session=True)
    first: tuple[int, float] | None = None  # the first signal and its time

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if first is None and (run / "config.json").is_file():  # without it no step has begun
            (run / "stop").touch()
            announce_stop(number)
            first = number, time.monotonic()
        elif first is None or time.monotonic() - first[1] > SAME_SIGNAL_SECONDS:
            first = first or (number, 0.0)
            os.killpg(job.pid, signal.SIGKILL)  # kills the agent, and the ranks end with it

    previous_handlers = {number: signal.signal(number, stop) for number in STOP_SIGNALS}
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = job.wait(timeout=1.0)
                break
            with contextlib.suppress(OSError):
                if first is not None:
                    # again, because ranks that were just starting may have removed it as an old one
                    (run / "stop").touch()
    finally:
        for number, handler in previous_handlers.items():
            signal.signal(number, handler)
    if first is None or (first[0] == signal.SIGINT and status == 0):
        return status
    return 128 + first[0]
