"""Implements the commands that fetch a policy and warm it up."""

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
        str, Argument(help="Directory, Hugging Face model id, tiny-llama or small-llama.")
    ] = "HuggingFaceTB/SmolLM2-135M-Instruct",
) -> None:
    """Downloads a model if necessary and prints its local directory."""
    announce(f"looking for {model}", data=True)
    from paceline.rl.models.policies import fetch_policy

    with user_errors():
        print(fetch_policy(model))


def warm_up_policy(
    config: Annotated[str, Argument(help="Recipe: a file, or the name of a packaged one.")],
    overrides: Overrides = None,
    drafter: Annotated[
        Path | None, Option(help="Also train a first drafter into this new directory.")
    ] = None,
    minutes: Annotated[float, Option(help="Minutes for sampling and training the drafter together.")] = 10.0,
) -> None:
    """Fine-tunes a recipe's policy on worked solutions; with --drafter it also trains a first drafter.

    The warmed-up policy is cached, and runs of the recipe start from it.
    """
    announce(f"warming up the policy of {config}: loading torch and transformers")
    from paceline.rl.models.initial import starting_policy
    from paceline.rl.preparation import prepare
    from paceline.rl.process.progress import Display
    from paceline.rl.recipe import load_config

    with user_errors():
        recipe = load_config(config, overrides or ())
        if recipe.policy.warmup is None and drafter is None:
            raise UserError(
                f"{config}: policy.warmup is null, so there is nothing to do: set policy.warmup, or name a "
                "directory with --drafter"
            )
        if recipe.policy.warmup is not None:
            with Display() as display:
                prepare(recipe, display, drafter=False)
            print(starting_policy(recipe))
    if drafter is not None:
        warm_up_drafter(config, drafter, overrides, minutes)
