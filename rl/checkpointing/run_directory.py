"""A run's directory at the start of a run or where one goes on, brought into order by the main rank."""

from __future__ import annotations

import contextlib
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from paceline.rl.checkpointing.checkpoint import Checkpoint, find_checkpoint, has_checkpoint, set_aside_broken
from paceline.rl.checkpointing.resume import compare_recipes, keep_recipe, record_resume
from paceline.rl.checkpointing.run_logs import LOGS, changed_logs, keep_first_lines
from paceline.rl.config.run import RunConfig
from paceline.rl.errors import UserError
from paceline.rl.process.files import disk_errors

T = TypeVar("T")
_TO_SPEAK = 2.0  # seconds
_OF_AN_ATTEMPT = ("drafters", "tensorboard", "checkpoint.new")


def is_main() -> bool:
    """Whether this process is rank 0, as launchers say in ``RANK``; before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def print_on_main(line: str) -> None:
    """Prints a line, on rank 0."""
    if is_main():
        print(f"paceline: {line}", flush=True)


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Does something on the main rank. Every rank returns what that returned, or ends where it failed.
    Collective.

    Raises:
        UserError: on the main rank, when the work raises it.
        SystemExit: on the other ranks then, so that the error is printed once.
    """
    told: list[T | None] = [None]
    error: UserError | None = None
    if accelerator.is_main_process:
        try:
            told = [work()]
        except UserError as raised:
            error = raised
    outcome: list[object] = [error is not None, *told]
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[0]:
        time.sleep(_TO_SPEAK)
        raise SystemExit(2)
    return outcome[1]  # type: ignore[return-value]


@contextlib.contextmanager
def main_rank_reports_first() -> Iterator[None]:
    """Lets rank 0 say what is wrong before other ranks do: its launcher ends them meanwhile, and one line is
    left.
    """
    try:
        yield
    except UserError:
        if not is_main():
            time.sleep(_TO_SPEAK)
        raise


def open_run(
    config: RunConfig, run: Path, ranks: int, resume: bool, overrides: Sequence[str]
) -> Checkpoint | None:
    """Brings a run's directory to where it goes on from, on the main rank.

    Args:
        config: The recipe.
        run: The directory.
        ranks: How many the run has from now on.
        resume: Whether the run goes on, instead of starting.
        overrides: ``key.sub=value`` each, given with ``--resume``.

    Returns:
        The checkpoint to go on from; None for the beginning.

    Raises:
        UserError: when no checkpoint is whole, it was made with another recipe, or the directory cannot be
            written.
    """
    with disk_errors(run):
        checkpoint = None
        if resume and has_checkpoint(run):
            checkpoint = find_checkpoint(run, print_on_main)
            if (changed := compare_recipes(config, checkpoint)) is not None:
                print_on_main(changed)
            for line in changed_logs(run, checkpoint.state):
                print_on_main(line)
            set_aside_broken(run, checkpoint)
        elif resume:
            print_on_main(
                f"{run} has no checkpoint yet: it was stopped before its first save, and starts from its "
                "beginning"
            )
        keep_recipe(config, run)
        done = 0 if checkpoint is None else checkpoint.steps_done
        for name in (*LOGS, "rollouts.jsonl"):
            if broken := keep_first_lines(run / name, done):
                print_on_main(f"{run / name}: {broken} broken lines were left out")
        if checkpoint is None:
            # that ended before its first checkpoint: the run must not take it for its own
            for name in _OF_AN_ATTEMPT:
                shutil.rmtree(run / name, ignore_errors=True)
            (run / "wandb.json").unlink(missing_ok=True)
        if resume:
            record_resume(run, done, ranks, overrides)
        return checkpoint
