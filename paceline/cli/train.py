"""Training: a process a rank, and a Ctrl-C or SIGTERM that leaves a run to go on from."""

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
    config: Annotated[str | None, Argument(help="a recipe, unless resuming")] = None,
    overrides: Overrides = None,
    ranks: Annotated[
        int, Option(help="processes on this machine; several machines: torchrun launch/train.py")
    ] = 1,
    dry_run: Annotated[
        bool, Option("--dry-run", help="check the recipe and print what it will take, without training")
    ] = False,
    gpu: Annotated[
        float | None,
        Option(metavar="GB", help="with --dry-run: memory of each rank's GPU; else this machine's"),
    ] = None,
    resume: Annotated[Path | None, Option(help="directory of a run to go on with")] = None,
) -> None:
    """Trains a recipe's policy. Ctrl-C or SIGTERM stops after the step, with a checkpoint to go on from; a
    second one at once.

    --resume RUN key=value goes on with other values of keys that a run bears to change, such as steps.
    """
    with user_errors():
        if resume is not None and config is not None and "=" in config:
            overrides, config = [config, *(overrides or ())], None
        if (config is None) == (resume is None):
            raise UserError("train: name a recipe or --resume RUN")
        if ranks < 1:
            raise UserError(f"train: --ranks is {ranks}: write at least 1")
        named = list(overrides or ()) if config is None else [config, *(overrides or ())]
        options = [
            *(["--dry-run"] if dry_run else []),
            *(["--resume", str(resume)] if resume is not None else []),
        ]
        announce(f"reading the recipe {config}" if resume is None else f"going on with {resume}")
        run = _directory(config, overrides, resume)  # a mistake is said here, before any rank starts
        if dry_run:
            from paceline.rl.run import run as run_here

            size = [] if gpu is None else ["--gpu", str(gpu)]
            run_here([*named, *options, "--ranks", str(ranks), *size])
        elif ranks == 1:
            os.execv(sys.executable, rank_command(1, [*named, *options]))
        else:
            raise SystemExit(_launch(ranks, [*named, *options], run))


def _directory(config: str | None, overrides: list[str] | None, resume: Path | None) -> Path:
    from paceline.rl.recipe import load_config

    if resume is not None:
        return resume
    assert config is not None
    return Path(load_config(config, overrides or ()).out)


def _launch(ranks: int, arguments: list[str], run: Path) -> int:
    """Starts the ranks under torchrun, in a session of their own: a terminal's Ctrl-C reaches this process
    alone, which asks them to stop by a file, because torchrun would kill them after half a minute. They end
    with this process, however it ends.
    """
    job = subprocess.Popen(rank_command(ranks, arguments), start_new_session=True)
    first: tuple[int, float] | None = None

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal first
        if first is None and (run / "config.json").is_file():  # else there is no step yet to stop after
            (run / "stop").touch()
            announce_stop(number)
            first = number, time.monotonic()
        elif first is None or time.monotonic() - first[1] > SAME_SIGNAL_SECONDS:
            first = first or (number, 0.0)
            os.killpg(job.pid, signal.SIGKILL)  # the agent, with which its ranks end

    before = {number: signal.signal(number, ask) for number in STOP_SIGNALS}
    try:
        while True:
            with contextlib.suppress(subprocess.TimeoutExpired):
                status = job.wait(timeout=1.0)
                break
            with contextlib.suppress(OSError):
                if first is not None:
                    # ranks that were about to start have removed it as an earlier run's
                    (run / "stop").touch()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if first is None or (first[0] == signal.SIGINT and status == 0):
        return status
    return 128 + first[0]
