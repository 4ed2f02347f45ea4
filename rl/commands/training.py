"""Training: a process a rank, and a Ctrl-C that leaves a run to go on from."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated

from typer import Argument, Option

from rl.cli import Overrides, user_errors
from rl.commands.rank import rank_command
from rl.errors import UserError


def train(
    config: Annotated[str | None, Argument(help="a recipe, unless resuming")] = None,
    overrides: Overrides = None,
    ranks: Annotated[int, Option(help="processes on this machine; several machines: torchrun launch/train.py")] = 1,
    dry_run: Annotated[bool, Option("--dry-run", help="check the recipe and print what it will take, without training")] = False,
    resume: Annotated[Path | None, Option(help="directory of a run to go on with")] = None,
) -> None:
    """Trains a recipe's policy. Ctrl-C stops after the step, with a checkpoint to go on from; a second one stops at once."""
    with user_errors():
        if (config is None) == (resume is None):
            raise UserError("train: name a recipe or --resume RUN")
        if ranks < 1:
            raise UserError(f"train: --ranks is {ranks}: write at least 1")
        named = [] if config is None else [config, *(overrides or ())]
        options = [*(["--dry-run"] if dry_run else []), *(["--resume", str(resume)] if resume is not None else [])]
        run = _directory(config, overrides, resume)  # a mistake is said here, before any rank starts
        if dry_run:
            from rl.train_command import run as run_here

            run_here([*named, *options])
        elif ranks == 1:
            os.execv(sys.executable, rank_command(1, [*named, *options]))
        else:
            raise SystemExit(_launch(ranks, [*named, *options], run))


def _directory(config: str | None, overrides: list[str] | None, resume: Path | None) -> Path:
    from rl.config import load_config

    if resume is not None:
        return resume
    assert config is not None
    return Path(load_config(config, overrides or ()).out)


def _launch(ranks: int, arguments: list[str], run: Path) -> int:
    """Ranks under torchrun, in a session of their own: a terminal's Ctrl-C reaches this process alone, which asks them to stop by a
    file, for torchrun would give them half a minute."""
    job = subprocess.Popen(rank_command(ranks, arguments), start_new_session=True)
    asked = False

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if asked or not run.is_dir():
            os.killpg(job.pid, signal.SIGTERM)
            return
        asked = True
        (run / "stop").touch()
        print("\npaceline: stopping after this step; Ctrl-C again to stop now", flush=True)

    before = signal.signal(signal.SIGINT, ask)
    try:
        return job.wait()
    finally:
        signal.signal(signal.SIGINT, before)
