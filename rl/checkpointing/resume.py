"""What a run may change when it goes on, and where that is kept."""

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

# A checkpoint means nothing without these: weights and moments of another model, half-finished groups of
#     another size, a place in
# another order of problems.
_FIXED = (
    "seed",
    "policy.model",
    "policy.warmup",
    "task",
    "rollout.group_size",
    "rollout.prompts_per_step",
    "rollout.segment_tokens",
    "rollout.tree",
    "rollout.max_context",  # leaves out prompts that have no room, as the endings of budgets do
    "length.budgets",
    "update.advantage",
    "scale.lora",
    "length.predictor",
    "drafter.draft_vocab_size",
)
_FREE = ("task.score_", "task.reward", "task.sandbox")  # of those: how scoring is done


def kept_recipe(run: Path, say: Callable[[str], None]) -> tuple[dict[str, Any], Path]:
    """Reads the recipe that a run keeps: ``config.json``, or where that is broken the one in its checkpoint.

    Returns:
        The recipe as plain data, and the file that it comes from.

    Raises:
        UserError: when there is none.
    """
    path = run / "config.json"
    if not run.is_dir():
        raise UserError(f"--resume {run}: no such directory, so no config.json; name the directory of a run")
    try:
        return read_object(path), path
    except UserError as error:
        for name in CHECKPOINTS:
            with contextlib.suppress(UserError):
                found = read_object(run / name / "recipe.json")
                say(f"{error}; going on with the recipe in {run / name}")
                return found, run / name / "recipe.json"
        if not path.exists():
            raise UserError(f"--resume {run}: no config.json there; name the directory of a run") from None
        raise UserError(f"--resume {run}: {error}; write the run's recipe there again, as JSON") from None


def resumed_recipe(run: Path, overrides: Sequence[str], say: Callable[[str], None]) -> RunConfig:
    """The recipe that a run goes on with.

    Args:
        run: The run's directory.
        overrides: ``key.sub=value`` each.
        say: Gets a line where ``config.json`` is broken and another copy is read.

    Raises:
        UserError: when there is none, or an override names a key that must not change.
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
    _refuse_changes(before, to_dict(config), f"--resume {run}")
    return config


def compare_recipes(config: RunConfig, checkpoint: Checkpoint) -> str | None:
    """Compares the recipe with the one that the checkpoint was made with: ``config.json`` may have been
    edited, or broken.

    Returns:
        A line that names what has changed, where something has.

    Raises:
        UserError: where a key differs without which the checkpoint means nothing, or no step is left.
    """
    if config.steps < checkpoint.steps_done:
        raise UserError(
            f"steps is {config.steps}: {checkpoint.path} has {checkpoint.steps_done} steps behind it; write "
            "more"
        )
    path = checkpoint.path / "recipe.json"
    if not path.exists():  # a checkpoint of an older release
        return None
    kept = to_dict(parse(RunConfig, read_object(path), where=str(path)))
    _refuse_changes(kept, to_dict(config), str(path))
    changed = [
        f"{key} {before!r:.40} → {after!r:.40}"
        for key, (before, after) in changes(kept, to_dict(config)).items()
    ]
    return f"other than before: {', '.join(changed)}" if changed else None


def changes(before: Any, after: Any, prefix: str = "") -> dict[str, tuple[Any, Any]]:
    """The keys in which two recipes differ, by their dotted names, with both values."""
    if isinstance(before, dict) and isinstance(after, dict) and (before or after):
        found: dict[str, tuple[Any, Any]] = {}
        for key in [*before, *(key for key in after if key not in before)]:
            found |= changes(before.get(key), after.get(key), f"{prefix}.{key}" if prefix else key)
        return found
    return {} if _plain(before) == _plain(after) else {prefix: (before, after)}


def _plain(value: Any) -> Any:
    return json.loads(json.dumps(value))  # tuples and lists are one


def _refuse_changes(kept: dict[str, Any], wanted: dict[str, Any], where: str) -> None:
    for key, (before, after) in changes(kept, wanted).items():
        fixed = any(
            key == name or key.startswith(name + ".") or name.startswith(key + ".") for name in _FIXED
        )
        if fixed and not key.startswith(_FREE):
            raise UserError(
                f"{where}: {key} was {before!r:.60} and is now {after!r:.60}: its checkpoint means nothing "
                "with that; "
                "leave it as it was, or start anew with another out="
            )


def keep_recipe(config: RunConfig, run: Path) -> None:
    """Writes ``config.json``, whole, where it is not there already."""
    write_atomically(run / "config.json", json.dumps(to_dict(config), indent=2) + "\n")


def record_resume(run: Path, steps_done: int, ranks: int, overrides: Sequence[str]) -> None:
    """Adds a line to ``resumes.jsonl``: when the run went on, from which step, on how many ranks, and with
    which changes.
    """
    now = datetime.now(UTC).isoformat(timespec="seconds")
    append_line(
        run / "resumes.jsonl", {"at": now, "step": steps_done, "ranks": ranks, "changed": list(overrides)}
    )
