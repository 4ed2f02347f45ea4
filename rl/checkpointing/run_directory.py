"""Prepares a run's directory on the main rank when the run starts or resumes."""

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
# Other ranks wait this long before they exit, so that the launcher does not kill rank 0 before it has printed
# the error.
_REPORT_SECONDS = 2.0
_LEFTOVERS = ("drafters", "tensorboard", "checkpoint.new")  # what an attempt without a checkpoint may leave


def is_main() -> bool:
    """Returns whether this process is rank 0 by the launcher's ``RANK``, which needs no process group."""
    return os.environ.get("RANK", "0") == "0"


def print_on_main(line: str) -> None:
    """Prints a line on rank 0 and does nothing on other ranks."""
    if is_main():
        print(f"paceline: {line}", flush=True)


def on_main(accelerator: Accelerator, work: Callable[[], T]) -> T:
    """Calls a function on the main rank and returns its result on every rank. Collective.

    Args:
        accelerator: The run's accelerator.
        work: Function without arguments; its result must be picklable.

    Raises:
        UserError: On the main rank, if ``work`` raises it.
        SystemExit: On the other ranks in that case, so that the error is printed once.
    """
    result: T | None = None
    error: UserError | None = None
    if accelerator.is_main_process:
        try:
            result = work()
        except UserError as raised:
            error = raised
    outcome: list[object] = [error is not None, result]
    broadcast_object_list(outcome)
    if error is not None:
        raise error
    if outcome[0]:
        time.sleep(_REPORT_SECONDS)
        raise SystemExit(2)
    return outcome[1]  # type: ignore[return-value]


@contextlib.contextmanager
def main_rank_reports_first() -> Iterator[None]:
    """Delays a `UserError` of the block on ranks other than 0, so that the error is printed only once.

    Rank 0 prints it and exits, and the launcher ends the other ranks while they wait.
    """
    try:
        yield
    except UserError:
        if not is_main():
            time.sleep(_REPORT_SECONDS)
        raise


def open_run(
    config: RunConfig, run: Path, ranks: int, resume: bool, overrides: Sequence[str]
) -> Checkpoint | None:
    """Resets a run's directory to the step that the run starts or resumes from. Called on the main rank only.

    Args:
        config: The recipe.
        run: The run's directory.
        ranks: Number of ranks from now on.
        resume: Whether the run resumes instead of starting.
        overrides: Changes given with ``--resume``, each as ``key.sub=value``.

    Returns:
        The checkpoint to resume from; None if the run starts from its first step.

    Raises:
        UserError: If no checkpoint is intact, the checkpoint does not fit the recipe, or the directory is not
            writable.
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
                f"{run} has no checkpoint yet: it was stopped before its first save, and starts from step 1"
            )
        keep_recipe(config, run)
        steps_done = 0 if checkpoint is None else checkpoint.steps_done
        for name in (*LOGS, "rollouts.jsonl"):
            if broken := keep_first_lines(run / name, steps_done):
                print_on_main(f"{run / name}: {broken} broken lines were left out")
        if checkpoint is None:
            # an earlier attempt that ended before its first checkpoint must not be mistaken for this run
            for name in _LEFTOVERS:
                shutil.rmtree(run / name, ignore_errors=True)
            (run / "wandb.json").unlink(missing_ok=True)
        if resume:
            record_resume(run, steps_done, ranks, overrides)
        return checkpoint
