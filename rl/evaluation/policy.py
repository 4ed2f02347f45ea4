"""Finds what ``paceline evaluate`` evaluates: a run's policy, or the one that a recipe starts from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paceline.rl.checkpointing.kept_checkpoints import find_kept
from paceline.rl.checkpointing.resume import kept_recipe
from paceline.rl.config.parsing import apply_override, parse
from paceline.rl.config.run import RunConfig
from paceline.rl.errors import UserError
from paceline.rl.evaluation.problems import check_not_trained
from paceline.rl.recipe import load_config
from paceline.rl.validation.recipe import check


def evaluated_policy(
    config: str | None, overrides: list[str], run: Path | None, checkpoint: str | None
) -> tuple[RunConfig, Path | None]:
    """Finds the recipe and the policy that ``paceline evaluate`` was asked to evaluate.

    Args:
        config: Name or path of a recipe; None for the run's own.
        overrides: Overrides of the recipe, ``key.sub=value`` each.
        run: Directory of a run, or None.
        checkpoint: Name of a checkpoint, ``best`` or ``step-N``; None for the run's last one.

    Returns:
        The recipe, and the directory of the policy; None for the policy that the recipe starts from.

    Raises:
        UserError: If nothing was named, there is no such checkpoint, or the run was trained on the problems.
    """
    if run is None:
        if config is None or checkpoint is not None:
            raise UserError(
                "evaluate: nothing to evaluate; name a recipe, or write --run RUN, with --checkpoint for an "
                "earlier one of its checkpoints"
            )
        return load_config(config, overrides), None
    if config is not None and "=" in config and not Path(config).exists():
        overrides, config = [config, *overrides], None  # without a recipe, its place holds an override
    policy = find_kept(run, checkpoint) / "policy"
    trained = _run_recipe(run)
    recipe = _run_recipe(run, overrides) if config is None else load_config(config, overrides)
    check_not_trained(recipe, trained)
    return recipe, policy


def _run_recipe(run: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Returns the recipe that a run keeps, with overrides."""
    data, path = kept_recipe(run, print)
    for override in overrides:
        apply_override(data, override)
    config = parse(RunConfig, data, where=str(path))
    check(config)
    return config
