"""A run on disk: whole checkpoints, replaced atomically, and what it takes to go on from one."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from paceline.drafter_trainer.storage.checkpoint import save_drafter
from paceline.drafter_trainer.storage.checksums import changed_files, prefix_sum, sync, write_checksums
from paceline.drafter_trainer.storage.optimizer_state import (
    save_optimizer,
    write_state,
)
from paceline.rl.errors import UserError
from paceline.rl.models.lora import save_adapters
from paceline.rl.models.policies import copy_tokenizer
from paceline.rl.process.files import read_lines, read_object, write_whole
from paceline.rl.sharding import WholeState
from paceline.rollout.drafters.eagle3_model import Eagle3Model
from paceline.rollout.strategy import Selector

# Names of checkpoints, the newest first. The older one stays until the next is begun: a run that finds the
# newest broken has it.
CHECKPOINTS = ("checkpoint", "checkpoint.old")
LOGS = ("metrics.jsonl", "timeline.jsonl")  # from which the report takes its numbers
_EXTRAS = (
    "drafter_optimizer",
    "drafter",
    "selector.json",
    "lengths.safetensors",
)  # what a run can do without: only speed depends on it


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `find_checkpoint` found.

    Attributes:
        path: Its directory.
        steps_done: The number of whole steps behind it.
        state: What else a run had come to.
        broken: Parts that must be left out, of ``drafter``, ``drafter_optimizer``, ``selector.json`` and
            ``lengths.safetensors``.
    """

    path: Path
    steps_done: int
    state: dict[str, Any] = field(default_factory=dict)
    broken: frozenset[str] = frozenset()


def save_checkpoint(
    run: Path,
    *,
    steps_done: int,
    policy: PreTrainedModel,
    tokenizer_from: Path,
    state_of_policy: WholeState,
    drafter: Eagle3Model | None,
    drafter_optimizer: torch.optim.Optimizer | None,
    selector: dict[str, Any] | None,
    state_of_critic: WholeState | None = None,
    lengths: dict[str, torch.Tensor] | None = None,
    adapters: dict[str, torch.Tensor] | None = None,
    state: dict[str, Any] | None = None,
    recipe: dict[str, Any] | None = None,
) -> None:
    """Writes ``checkpoint/`` of a run beside the last one, waits until it is on the disk, then swaps them by
    renaming: at every instant a whole one exists. The last one stays as ``checkpoint.old`` until the next is
        begun.

    Args:
        run: The run's directory.
        steps_done: Whole steps behind it.
        policy: Whose config is kept.
        tokenizer_from: Directory with its tokenizer.
        state_of_policy: Its whole weights under the names they have without adapters, and what is trained of
            it.
        drafter, drafter_optimizer: None before there are.
        selector: The strategy selector's state.
        state_of_critic: Where the recipe has one.
        lengths: The length predictor's weights, where the recipe has one.
        adapters: Weights of adapters by their names in the policy, where the recipe has them.
        state: What else a run had come to.
        recipe: Of the run, as plain data: what may not change when it goes on is compared with it.

    Raises:
        UserError: when the disk is full or not writable; the previous checkpoint stays.
    """
    building, final, old = run / "checkpoint.new", run / "checkpoint", run / "checkpoint.old"
    try:
        shutil.rmtree(building, ignore_errors=True)
        if final.exists():  # else the older one is all there is
            shutil.rmtree(old, ignore_errors=True)
        building.mkdir(parents=True)
        policy.save_pretrained(building / "policy", state_dict=state_of_policy.weights)
        copy_tokenizer(tokenizer_from, building / "policy")
        write_state(state_of_policy.optimizer, building / "optimizer")
        if adapters is not None:
            save_adapters(policy, adapters, building / "adapter")
        save_drafting(building, drafter, drafter_optimizer, selector)
        if state_of_critic is not None:
            save_file(state_of_critic.weights, building / "critic.safetensors")
            write_state(state_of_critic.optimizer, building / "critic_optimizer")
        if lengths is not None:
            save_file(lengths, building / "lengths.safetensors")
        if recipe is not None:
            (building / "recipe.json").write_text(json.dumps(recipe, indent=2) + "\n")
        # Random numbers are functions of (seed, step): the step is all the state that they have.
        kept = {"steps_done": steps_done, "logs": _log_sums(run), **(state or {})}
        (building / "state.json").write_text(json.dumps(kept))
        write_checksums(building)
        if final.exists():
            final.rename(old)
        building.rename(final)
        sync(run)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        raise UserError(
            f"{building}: the checkpoint could not be written ({error}); free some disk, then --resume {run}"
        ) from None


def save_drafting(
    folder: Path,
    drafter: Eagle3Model | None,
    optimizer: torch.optim.Optimizer | None,
    selector: dict[str, Any] | None,
) -> None:
    """Writes what speculation has learned: the drafter with its optimizer, and the selector's state. Errors
    come as they are.
    """
    if drafter is not None and optimizer is not None:
        save_drafter(drafter, folder / "drafter", torch.float32)
        save_optimizer(optimizer, folder / "drafter_optimizer")
    if selector is not None:
        (folder / "selector.json").write_text(json.dumps(selector))


def has_checkpoint(run: Path) -> bool:
    """Whether a run has come as far as its first checkpoint, whole or not."""
    return any((run / name).is_dir() for name in CHECKPOINTS)


def find_checkpoint(run: Path, say: Callable[[str], None] = lambda line: None) -> Checkpoint:
    """Finds the last whole checkpoint of a run. Every file is compared with its checksum.

    Args:
        run: The run's directory.
        say: Gets a line about every checkpoint that is passed over and every part that is left out.

    Raises:
        UserError: when there is none.
    """
    problems: list[str] = []
    for path in (run / name for name in CHECKPOINTS):
        if not path.is_dir():
            continue
        try:
            found = _checked(path, say)
        except UserError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            say(f"{problem}; going on from the older {path}, after step {found.steps_done}")
        return found
    if problems:
        raise UserError(
            f"{'; '.join(problems)}; no older checkpoint is whole: put back a copy of that file, or start "
            "anew with another out="
        )
    raise UserError(
        f"--resume {run}: no checkpoint there; it was stopped before its first save, start it again without "
        "--resume"
    )


def _checked(path: Path, say: Callable[[str], None]) -> Checkpoint:
    changed = changed_files(path)
    if changed is None:
        say(
            f"{path}: no checksums to compare its files with (from an older release, or lost); going on "
            "without"
        )
    broken: set[str] = set()
    for name, reason in (changed or {}).items():
        extra = next((part for part in _EXTRAS if name.startswith(part)), None)
        if extra is None:
            raise UserError(f"{path / name}: {reason}")
        broken.add(extra)
        say(f"{path / name}: {reason}; going on without")
    state = read_object(path / "state.json")
    for key, (kind, required) in _STATE.items():
        value = state.get(key)
        fits = (
            isinstance(value, kind)
            and not isinstance(value, bool)
            and (not isinstance(value, float) or math.isfinite(value))
        )
        if not fits and (required or value is not None):
            raise UserError(f"{path / 'state.json'}: {key} is {value!r:.40}")
    if state["steps_done"] < 0:
        raise UserError(f"{path / 'state.json'}: steps_done is {state['steps_done']}")
    return Checkpoint(path, state["steps_done"], state, frozenset(broken))


_STATE: dict[str, tuple[Any, bool]] = {
    "steps_done": (int, True),
    "kl_coef": (int | float, False),
    "entropy": (int | float, False),
    "prompts": (dict, False),
    "guard": (dict, False),
    "evaluation": (dict, False),
    "open": (list, False),
    "logs": (dict, False),
}


def _log_sums(run: Path) -> dict[str, tuple[int, str]]:
    return {name: prefix_sum(run / name) for name in LOGS if (run / name).is_file()}


def changed_logs(run: Path, checkpoint: Checkpoint) -> list[str]:
    """A line for each of a run's logs that is not as it was when the checkpoint was made, beside what was
    added since.
    """
    said = []
    for name, kept in checkpoint.state.get("logs", {}).items():
        try:
            if list(prefix_sum(run / name, kept[0])) == list(kept):
                continue
            reason = "has changed"
        except OSError as error:
            reason = (
                "is missing" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
            )
        said.append(f"{run / name} {reason} since the checkpoint was made: the report's numbers may be wrong")
    return said


def set_aside_broken(run: Path, used: Checkpoint) -> None:
    """Renames a broken ``checkpoint`` to ``checkpoint.broken``, so that the older one that is used is not
    deleted in its favour.
    """
    newest = run / CHECKPOINTS[0]
    if used.path != newest and newest.exists():
        shutil.rmtree(run / "checkpoint.broken", ignore_errors=True)
        newest.rename(run / "checkpoint.broken")


def restore_selector(checkpoint: Checkpoint, selector: Selector) -> str | None:
    """Goes on from what the checkpoint's strategy selector had learned, where it has one that can be read.

    Returns:
        A line where it has one that cannot be: the selector then learns anew.
    """
    path = checkpoint.path / "selector.json"
    if "selector.json" in checkpoint.broken or not path.exists():
        return None
    try:
        state = read_object(path)
        _check_leaves(state)
        selector.load_state(state)
    except (UserError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        reason = str(error).removeprefix(f"{path}: ")
        return f"{path}: {reason}; strategies are measured anew"
    return None


def _check_leaves(value: Any) -> None:
    """Refuses numbers that are none: what was measured is finite."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_leaves(inner)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a measured number is {value}")


def keep_first_lines(path: Path, steps_done: int) -> int:
    """Drops the lines of ``path`` (JSON with a "step" each) that belong to steps after the checkpoint, and
    those that are broken.

    Returns:
        How many broken lines there were, beside a last one that a kill has cut off.
    """
    if not path.exists():
        return 0
    lines, broken = read_lines(path)
    cut = broken > 0 and not path.read_bytes().endswith(b"\n")
    write_whole(path, "".join(json.dumps(line) + "\n" for line in lines if line["step"] < steps_done))
    return broken - cut
