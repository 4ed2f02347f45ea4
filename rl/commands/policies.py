"""Policies: fetched, and warmed up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer import Argument, Option

from rl.cli import Overrides, user_errors
from rl.commands.drafters import warm_up_drafter
from rl.config import RunConfig, load_config
from rl.errors import UserError
from rl.machine import fit_process
from rl.policies import SMOLLM2, fetch_policy
from rl.warmup import warm_up


def fetch(model: Annotated[str, Argument(help="directory, hub id, tiny-llama or small-llama")] = SMOLLM2) -> None:
    """Resolves a model id to a directory, fetching it if need be, and prints it."""
    with user_errors():
        print(fetch_policy(model))


def warm_up_policy(
    config: Annotated[str, Argument(help="a recipe")],
    overrides: Overrides = None,
    drafter: Annotated[Path | None, Option(help="also make a first drafter, in this new directory")] = None,
    minutes: Annotated[float, Option(help="for the drafter, of sampling and training together")] = 10.0,
) -> None:
    """Warms a recipe's policy up on worked solutions, and with --drafter makes a first drafter for it. Both are kept: runs of the
    recipe find the policy."""
    with user_errors():
        recipe = load_config(config, overrides or ())
        if recipe.policy.warmup is None and drafter is None:
            raise UserError(f"{config}: policy.warmup is null: name a directory with --drafter, or there is nothing to do")
        fit_process(local_world_size=1)
        if recipe.policy.warmup is not None:
            print(_warmed(recipe))
    if drafter is not None:
        warm_up_drafter(config, drafter, overrides, minutes)


def _warmed(recipe: RunConfig) -> Path:
    console = Console()
    columns = (
        TextColumn("warm-up"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        bar = progress.add_task("", total=None, loss=float("nan"))

        def show(step: int, steps: int, loss: float) -> None:
            progress.update(bar, completed=step, total=steps, loss=loss)
            if not console.is_terminal and (step % 8 == 0 or step == steps):
                console.print(f"warm-up step {step}/{steps}  loss {loss:.3f}", highlight=False)

        return warm_up(recipe, show)
