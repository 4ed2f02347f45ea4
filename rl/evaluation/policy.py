"""What ``paceline evaluate`` evaluates: a recipe and the policy of a run, or the one that the recipe starts
from.
"""

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
    """Finds what ``paceline evaluate`` was asked to evaluate.

    Args:
        config: A recipe; None for the run's own.
        overrides: ``key.sub=value`` each.
        run: Directory of a run, or None.
        checkpoint: ``best`` or ``step-N``; None for its last one.

    Returns:
        The recipe, and the directory of the policy, None for the one that the recipe starts from.

    Raises:
        UserError: when nothing was named, there is no such checkpoint, or the run was trained on what would
            be asked.
    """
    if run is None:
        if config is None or checkpoint is not None:
            raise UserError(
                "evaluate: name a recipe, or --run RUN with --checkpoint for one that it has kept"
            )
        return load_config(config, overrides), None
    if config is not None and "=" in config and not Path(config).exists():
        overrides, config = [config, *overrides], None  # the first override stands where a recipe would
    policy = find_kept(run, checkpoint) / "policy"
    trained = _recipe_of(run)
    recipe = _recipe_of(run, overrides) if config is None else load_config(config, overrides)
    check_not_trained(recipe, trained)
    return recipe, policy


def _recipe_of(run: Path, overrides: Sequence[str] = ()) -> RunConfig:
    """The recipe that a run keeps, with changes."""
    data, path = kept_recipe(run, print)
    for override in overrides:
        apply_override(data, override)
    config = parse(RunConfig, data, where=str(path))
    check(config)
    return config
