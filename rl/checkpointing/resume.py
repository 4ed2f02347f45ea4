"""Reads the recipe that a run resumes with, and decides which keys may differ from before."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from paceline.rl.checkpointing.checkpoint import CHECKPOINTS, Checkpoint
from paceline.rl.config.parsing import apply_override, parse
from paceline.rl.config.run import RunConfig, to_dict
from paceline.rl.errors import UserError
from paceline.rl.process.files import append_line, read_object, write_atomically
from paceline.rl.validation.recipe import check

# A checkpoint is useless with other values: its weights and moments belong to another model, its unfinished
# groups have another size, or its position belongs to another order of problems.
_FIXED_KEYS = (
    "seed",
    "policy.model",
    "policy.warmup",
    "task",
    "rollout.group_size",
    "rollout.prompts_per_step",
    "rollout.segment_tokens",
    "rollout.tree",
    "rollout.max_context",  # decides which prompts fit, as do the endings that budgets append
    "length.budgets",
    "update.advantage",
    "scale.lora",
    "length.predictor",
    "drafter.draft_vocab_size",
)
_FREE_PREFIXES = ("task.score_", "task.reward", "task.sandbox")  # exceptions: they only say how to score


def kept_recipe(run: Path, say: Callable[[str], None]) -> tuple[dict[str, Any], Path]:
    """Reads the recipe that a run has stored: ``config.json``, or the checkpoint's copy if that is broken.

    Args:
        run: The run's directory.
        say: Function that is called with a line if the checkpoint's copy is used.

    Returns:
        The recipe as plain data, and the file that it comes from.

    Raises:
        UserError: If there is no readable recipe.
    """
    path = run / "config.json"
    if not run.is_dir():
        raise UserError(f"--resume {run}: no such directory, and no config.json; name the directory of a run")
    try:
        return read_object(path), path
    except UserError as error:
        for name in CHECKPOINTS:
            with contextlib.suppress(UserError):
                recipe = read_object(run / name / "recipe.json")
                say(f"{error}; resuming with the recipe in {run / name}")
                return recipe, run / name / "recipe.json"
        if not path.exists():
            raise UserError(f"--resume {run}: no config.json there; name the directory of a run") from None
        raise UserError(f"--resume {run}: {error}; write the run's recipe there again, as JSON") from None


def resumed_recipe(run: Path, overrides: Sequence[str], say: Callable[[str], None]) -> RunConfig:
    """Returns the recipe that a run resumes with.

    Args:
        run: The run's directory.
        overrides: Changes, each as ``key.sub=value``.
        say: Function that is called with a line if ``config.json`` is broken and another copy is used.

    Raises:
        UserError: If there is no readable recipe, or an override changes a key that must stay.
    """
    data, path = kept_recipe(run, say)
    before = to_dict(parse(RunConfig, data, where=str(path)))
    for override in overrides:
        apply_override(data, override)
    where = f"--resume {run}" if overrides else str(path)
    config = parse(RunConfig, data, where=where)
    try:
        check(config)
    except UserError as error:
        raise UserError(f"{where}: {error}") from None
    _reject_fixed_changes(before, to_dict(config), f"--resume {run}")
    return config


def compare_recipes(config: RunConfig, checkpoint: Checkpoint) -> str | None:
    """Compares the recipe with the checkpoint's, because ``config.json`` may have been edited or broken.

    Args:
        config: The recipe that the run resumes with.
        checkpoint: The checkpoint that it resumes from.

    Returns:
        A line that lists the changed keys; None if nothing has changed.

    Raises:
        UserError: If a key that must stay has changed, or the checkpoint has more steps than the recipe.
    """
    if config.steps < checkpoint.steps_done:
        raise UserError(
            f"steps is {config.steps}, but {checkpoint.path} has done {checkpoint.steps_done} steps already; "
            "write a larger number"
        )
    path = checkpoint.path / "recipe.json"
    if not path.exists():  # a checkpoint of an older release
        return None
    stored = to_dict(parse(RunConfig, read_object(path), where=str(path)))
    _reject_fixed_changes(stored, to_dict(config), str(path))
    changed = [
        f"{key} {before!r:.40} → {after!r:.40}"
        for key, (before, after) in changes(stored, to_dict(config)).items()
    ]
    return f"changed since the checkpoint: {', '.join(changed)}" if changed else None


def changes(before: Any, after: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """Returns the keys in which two recipes differ.

    Args:
        before: A recipe as plain data, or a value in it.
        after: Its counterpart.
        prefix: Dotted name of the key that both belong to; empty for whole recipes.

    Returns:
        Both values, by dotted key.
    """
    if isinstance(before, dict) and isinstance(after, dict) and (before or after):
        changed: dict[str, tuple[Any, Any]] = {}
        for key in [*before, *(key for key in after if key not in before)]:
            changed |= changes(before.get(key), after.get(key), f"{prefix}.{key}" if prefix else key)
        return changed
    return {} if _as_json(before) == _as_json(after) else {prefix: (before, after)}


def _as_json(value: Any) -> Any:
    return json.loads(json.dumps(value))  # a tuple and a list with the same items are then equal


def _reject_fixed_changes(stored: dict[str, Any], recipe: dict[str, Any], where: str) -> None:
    for key, (before, after) in changes(stored, recipe).items():
        fixed = any(
            key == name or key.startswith(name + ".") or name.startswith(key + ".") for name in _FIXED_KEYS
        )
        if fixed and not key.startswith(_FREE_PREFIXES):
            raise UserError(
                f"{where}: {key} was {before!r:.60} and is now {after!r:.60}, which its checkpoint cannot be "
                "used with; restore the old value, or start a new run with another out="
            )


def keep_recipe(config: RunConfig, run: Path) -> None:
    """Writes the recipe to ``config.json`` atomically, unless the file has this content already."""
    write_atomically(run / "config.json", json.dumps(to_dict(config), indent=2) + "\n")


def record_resume(run: Path, steps_done: int, ranks: int, overrides: Sequence[str]) -> None:
    """Appends a line to ``resumes.jsonl`` with the time, the step, the number of ranks and the changes.

    Args:
        run: The run's directory.
        steps_done: Number of steps that the run resumes after.
        ranks: Number of ranks from now on.
        overrides: Changes of the recipe, each as ``key.sub=value``.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    append_line(
        run / "resumes.jsonl", {"at": now, "step": steps_done, "ranks": ranks, "changed": list(overrides)}
    )
