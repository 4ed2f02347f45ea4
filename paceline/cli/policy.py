"""Policies: fetched, and warmed up."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from paceline.cli.common import Overrides
from paceline.cli.drafter import warm_up_drafter
from paceline.rl.errors import UserError, user_errors
from paceline.rl.process.console import announce


def fetch(
    model: Annotated[
        str, Argument(help="directory, hub id, tiny-llama or small-llama")
    ] = "HuggingFaceTB/SmolLM2-135M-Instruct",
) -> None:
    """Resolves a model id to a directory, fetching it if need be, and prints it."""
    announce(f"looking for {model}", data=True)
    from paceline.rl.models.policies import fetch_policy

    with user_errors():
        print(fetch_policy(model))


def warm_up_policy(
    config: Annotated[str, Argument(help="a recipe")],
    overrides: Overrides = None,
    drafter: Annotated[Path | None, Option(help="also make a first drafter, in this new directory")] = None,
    minutes: Annotated[float, Option(help="for the drafter, of sampling and training together")] = 10.0,
) -> None:
    """Warms a recipe's policy up on worked solutions, and with --drafter makes a first drafter for it. Both
    are kept: runs of the recipe find the policy.
    """
    announce(f"warming the policy of {config} up: loading torch and transformers")
    from paceline.rl.models.initial import starting_policy
    from paceline.rl.preparation import prepare
    from paceline.rl.process.progress import Display
    from paceline.rl.recipe import load_config

    with user_errors():
        recipe = load_config(config, overrides or ())
        if recipe.policy.warmup is None and drafter is None:
            raise UserError(
                f"{config}: policy.warmup is null: name a directory with --drafter, or there is nothing to do"
            )
        if recipe.policy.warmup is not None:
            with Display() as display:
                prepare(recipe, display, drafter=False)
            print(starting_policy(recipe))
    if drafter is not None:
        warm_up_drafter(config, drafter, overrides, minutes)
