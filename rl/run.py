"""The training command as each rank runs it; ``launch/train.py`` and ``paceline train`` lead here."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed

from paceline.drafter_trainer.errors import DrafterError
from paceline.drafter_trainer.storage.export import export_drafter
from paceline.rl.checkpointing.checkpoint import has_checkpoint
from paceline.rl.checkpointing.graceful_stop import GracefulStop
from paceline.rl.checkpointing.resume import resumed_recipe
from paceline.rl.checkpointing.run_directory import (
    is_main,
    main_rank_reports_first,
    on_main,
    open_run,
    print_on_main,
)
from paceline.rl.checkpointing.run_lock import RunLock
from paceline.rl.config.run import RunConfig
from paceline.rl.dry_run.description import describe
from paceline.rl.dry_run.tiny_step import try_tiny_step
from paceline.rl.errors import UserError, user_errors
from paceline.rl.monitoring.summary import read_metrics, summarise, table
from paceline.rl.monitoring.tracker import Tracker
from paceline.rl.preparation import check_same_start, prepare
from paceline.rl.process.files import disk_errors, write_atomically
from paceline.rl.process.parent_death import end_with_launcher
from paceline.rl.process.process_tuning import fit_process, name_deepspeeds_device
from paceline.rl.process.progress import Display
from paceline.rl.recipe import load_config
from paceline.rl.rewards.example import score_example
from paceline.rl.tasks.prompt_check import check_recipe
from paceline.rl.tasks.task import load_task
from paceline.rl.trainer import Trainer, make_accelerator


def parse_arguments(description: str | None, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Parses the command line of ``launch/train.py``.

    Args:
        description: Description in the help text.
        arguments: Arguments; None takes those of the process.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", nargs="?", help="recipe; leave it out to resume")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="check the recipe, print its estimated cost, and run a tiny step of it",
    )
    parser.add_argument("--ranks", type=int, help="with --dry-run: number of ranks; default is torchrun's")
    parser.add_argument(
        "--gpu",
        type=float,
        metavar="GB",
        help="with --dry-run: memory of a rank's GPU; default is this machine's",
    )
    parser.add_argument(
        "--resume",
        type=Path,
        metavar="RUN",
        help="directory of a run to resume, with key=value overrides if wanted",
    )
    args = parser.parse_intermixed_args(arguments)
    if args.resume is not None and args.config is not None and "=" in args.config:
        args.config, args.overrides = None, [args.config, *args.overrides]
    if (args.config is None) == (args.resume is None):
        parser.error("name a recipe or --resume RUN")
    if args.dry_run and args.resume is not None:
        parser.error("--dry-run cannot be combined with --resume: name a recipe")
    return args


def find_run(args: argparse.Namespace) -> tuple[RunConfig, Path]:
    """Returns the recipe and the run's directory.

    Raises:
        UserError: The recipe is invalid, its directory already holds a run, or a resumed run does not allow
            the changes.
    """
    if args.resume is not None:
        return resumed_recipe(args.resume, args.overrides, print_on_main), args.resume
    config = load_config(args.config, args.overrides)
    run = Path(config.out)
    if has_checkpoint(run) or (run / "summary.json").exists():
        raise UserError(f"out is {run}, which holds a run: write another out=..., or --resume {run}")
    return config, run


def main(description: str | None) -> None:
    """Runs the command with the process's arguments and prints user errors as one line."""
    end_with_launcher()
    with user_errors(), main_rank_reports_first():
        run(sys.argv[1:], description)


def run(arguments: Sequence[str], description: str | None = None) -> None:
    """Runs the command with the given arguments; exceptions propagate."""
    status = train(parse_arguments(description, arguments))
    if status:
        raise SystemExit(status)


def train(args: argparse.Namespace) -> int:
    """Trains from a recipe or from a checkpoint, writes the report, and returns the exit status."""
    name_deepspeeds_device()
    if args.dry_run:
        dry_run(args)
        return 0
    config, run = find_run(args)
    fit_process(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    with Display(active=is_main()) as display, disk_errors(run), RunLock(run, active=is_main()):
        # must precede the process group: with one, transformers writes models on rank 0 only
        config = prepare(config, display, drafter=not has_checkpoint(run))
        interruption, finished = train_ranks(config, run, args, display)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return 0 if finished else interruption.status


def train_ranks(
    config: RunConfig, run: Path, args: argparse.Namespace, display: Display
) -> tuple[GracefulStop, bool]:
    """Trains on all ranks after the preparation. Collective.

    Returns:
        The handler of signals that may have stopped the run, and whether the run is finished.
    """
    accelerator = make_accelerator(config, timeout=timedelta(minutes=config.scale.timeout_minutes))
    check_same_start(config, accelerator)
    main, resume = accelerator.is_main_process, args.resume is not None
    checkpoint = on_main(
        accelerator, lambda: open_run(config, run, accelerator.num_processes, resume, args.overrides)
    )
    with Tracker(config, run, main, 0 if checkpoint is None else checkpoint.steps_done, display) as tracker:
        tracker.say(f"{accelerator.num_processes} ranks on {accelerator.device.type}; run directory {run}")
        with GracefulStop(run, main) as interruption:
            with display.phase("loading the policy and measuring the engine's forward passes"):
                trainer = Trainer(config, run, accelerator, checkpoint, tracker)
            finished = trainer.run(interruption)
        if main and finished:
            finish(config, run, tracker)
        elif main:
            tracker.say(f"stopped; continue with --resume {run}")
    accelerator.wait_for_everyone()
    return interruption, finished


def dry_run(args: argparse.Namespace) -> None:
    """Checks a recipe, prints its estimated cost, and runs a few tiny steps of it."""
    config = load_config(args.config, args.overrides)
    task = load_task(config.task, config.seed)
    warnings = check_recipe(task, config)
    ranks = args.ranks or int(os.environ.get("WORLD_SIZE", "1"))
    print("\n".join([*describe(config, Path(args.config), ranks, args.gpu), *warnings]), flush=True)
    example = score_example(task.problems[0], config.task, config.seed, config.rollout.group_size)
    print("\n".join(example), flush=True)
    print(try_tiny_step(config))


def finish(config: RunConfig, run: Path, tracker: Tracker) -> None:
    """Writes summary, report and exported drafter.

    A failure is reported and does not fail the run, because the policy is in the checkpoint.
    """
    paths = {"policy": str(run / "checkpoint" / "policy")}
    try:
        summary = summarise(read_metrics(run))
        write_atomically(run / "summary.json", json.dumps(summary, indent=2) + "\n")
        tracker.display.show(table(summary))
        for line in summary.get("speculation", ()):
            tracker.say(line)
        with tracker.display.phase("report"):
            # matplotlib takes a second to import, and only the first rank needs it
            from paceline.rl.monitoring.report import write_report

            paths["report"] = str(write_report(run))
    except UserError as error:
        tracker.say(f"report: {error}")
    if (run / "checkpoint" / "drafter").is_dir():
        number = 0
        while (out := run / ("drafter" if number == 0 else f"drafter-{number}")).exists():
            number += 1
        try:
            paths["drafter"] = str(export_drafter(run, out))
        except DrafterError as error:
            tracker.say(f"drafter: {error}")
    for name, path in paths.items():  # outside the table, which would truncate them
        tracker.say(f"{name}: {path}")
