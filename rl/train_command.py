"""What ``launch/train.py`` and ``paceline train`` do, in each rank."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch.distributed

from drafter_trainer.checkpoint import DrafterError
from drafter_trainer.export import export_drafter
from rl.cli import user_errors
from rl.config import RunConfig, check, load_config
from rl.errors import UserError
from rl.estimate import describe
from rl.interruption import Interruption
from rl.machine import fit_process
from rl.prompt_check import check_recipe
from rl.report import write_report
from rl.run_state import Checkpoint, find_checkpoint
from rl.starting import starting_policy
from rl.strict import parse
from rl.summary import read_metrics, summarise, table
from rl.tracking import Tracker
from rl.trainer import Trainer, make_accelerator, write_config


def parse_arguments(description: str | None, arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("config", nargs="?", help="a recipe, unless resuming")
    parser.add_argument("overrides", nargs="*", help="key=value")
    parser.add_argument("--dry-run", action="store_true", help="check the recipe and print what it will take, without training")
    parser.add_argument("--resume", type=Path, metavar="RUN", help="directory of a run to go on with")
    args = parser.parse_intermixed_args(arguments)
    if (args.config is None) == (args.resume is None):
        parser.error("name a recipe or --resume RUN")
    if args.dry_run and args.resume is not None:
        parser.error("--dry-run is about a recipe, not about a run")
    return args


def prepare(args: argparse.Namespace) -> tuple[RunConfig, Path, Checkpoint | None]:
    """The recipe, the run's directory, and where to go on from."""
    if args.resume is None:
        config = load_config(args.config, args.overrides)
        run = Path(config.out)
        if (run / "metrics.jsonl").exists():
            raise UserError(f"out is {run}, which holds a run: write another out=..., or --resume {run}")
        return config, run, None
    kept = args.resume / "config.json"
    if not kept.is_file():
        raise UserError(f"--resume {args.resume}: no config.json there; name the directory of a run")
    config = parse(RunConfig, json.loads(kept.read_text()), where=str(kept))
    check(config)
    return config, args.resume, find_checkpoint(args.resume)


def main(description: str | None) -> None:
    """The whole command, with errors of the user's as one line."""
    with user_errors():
        train(parse_arguments(description))


def run(arguments: Sequence[str]) -> None:
    """The same with arguments of one's own, and errors as they are."""
    train(parse_arguments(None, arguments))


def train(args: argparse.Namespace) -> None:
    """A run, from its recipe or from where it stopped, to its report."""
    if args.dry_run:
        config = load_config(args.config, args.overrides)
        said = check_recipe(config)
        print("\n".join([*describe(config, Path(args.config), int(os.environ.get("WORLD_SIZE", "1"))), *said]))
        return
    config, run, checkpoint = prepare(args)
    fit_process(int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    starting_policy(config)  # before there is a process group: once there is one, transformers writes models on rank 0 only
    accelerator = make_accelerator(config, timeout=timedelta(minutes=config.scale.timeout_minutes))
    if accelerator.is_main_process:
        run.mkdir(parents=True, exist_ok=True)
        write_config(config, run)
    accelerator.wait_for_everyone()
    with Tracker(config, run, accelerator.is_main_process) as tracker:
        tracker.say(f"{accelerator.num_processes} ranks on {accelerator.device.type}; run directory {run}")
        with Interruption(run, accelerator.is_main_process) as interruption:
            whole = Trainer(config, run, accelerator, checkpoint, tracker).run(interruption)
        if accelerator.is_main_process and whole:
            finish(config, run, tracker)
        elif accelerator.is_main_process:
            tracker.say(f"stopped; go on with --resume {run}")
    accelerator.wait_for_everyone()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def finish(config: RunConfig, run: Path, tracker: Tracker) -> None:
    """Report, summary and exported drafter."""
    summary = summarise(read_metrics(run))
    (run / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    paths = {"report": str(write_report(run)), "policy": str(run / "checkpoint" / "policy")}
    if (run / "checkpoint" / "drafter").is_dir():
        number = 0
        while (out := run / ("drafter" if number == 0 else f"drafter-{number}")).exists():
            number += 1
        try:
            paths["drafter"] = str(export_drafter(run, out))
        except DrafterError as error:
            tracker.say(f"drafter: {error}")
    tracker.console.print(table(summary))
    for name, path in paths.items():  # outside the table, which would cut them short
        tracker.console.print(f"{name}: {path}", highlight=False, soft_wrap=True)
