"""A run on disk: one whole checkpoint, replaced atomically, and what it takes to go on from it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from drafter_trainer.checkpoint import save_drafter
from drafter_trainer.optimizer_state import OptimizerStateError, load_optimizer, save_optimizer
from rl.errors import UserError
from rl.policies import copy_tokenizer
from rollout.drafters.eagle3_model import Eagle3Model


class Saved(Protocol):
    """What writes its own part of a checkpoint."""

    def save(self, folder: Path) -> None:
        """Into a directory that exists; OSError and SafetensorError as they come."""
        ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What `find_checkpoint` found: the directory, the number of whole steps behind it, and what else a run had come to."""

    path: Path
    steps_done: int
    state: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    run: Path,
    *,
    steps_done: int,
    policy: PreTrainedModel,
    tokenizer_from: Path,
    optimizer: torch.optim.Optimizer,
    drafter: Eagle3Model | None,
    drafter_optimizer: torch.optim.Optimizer | None,
    selector: dict[str, Any] | None,
    critic: Saved | None = None,
    state: dict[str, Any] | None = None,
) -> None:
    """Writes ``checkpoint/`` of a run beside the old one, then swaps them by renaming: at every instant one whole one exists.

    Raises:
        UserError: when the disk is full or not writable; the previous checkpoint stays.
    """
    building, final, old = run / "checkpoint.new", run / "checkpoint", run / "checkpoint.old"
    try:
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir(parents=True)
        policy.save_pretrained(building / "policy")
        copy_tokenizer(tokenizer_from, building / "policy")
        save_optimizer(optimizer, building / "optimizer")
        if drafter is not None and drafter_optimizer is not None:
            save_drafter(drafter, building / "drafter", torch.float32)
            save_optimizer(drafter_optimizer, building / "drafter_optimizer")
        if critic is not None:
            critic.save(building)
        if selector is not None:
            (building / "selector.json").write_text(json.dumps(selector))
        # Random numbers are functions of (seed, step): the step is all the state that they have.
        (building / "state.json").write_text(json.dumps({"steps_done": steps_done, **(state or {})}))
    except (OSError, SafetensorError) as error:
        shutil.rmtree(building, ignore_errors=True)
        raise UserError(f"{building}: the checkpoint could not be written ({error}); free some disk, then --resume {run}") from None
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    building.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def find_checkpoint(run: Path) -> Checkpoint:
    """The last whole checkpoint of a run.

    Raises:
        UserError: when there is none.
    """
    for name in ("checkpoint", "checkpoint.old"):
        state = run / name / "state.json"
        if state.is_file():
            try:
                kept = json.loads(state.read_text())
                return Checkpoint(run / name, int(kept["steps_done"]), kept)
            except (json.JSONDecodeError, KeyError, ValueError):
                raise UserError(f"{state}: not a checkpoint's state; delete {run / name} to go on from an older one") from None
    raise UserError(f"--resume {run}: no checkpoint there; it was stopped before its first save, start it again without --resume")


def restore_optimizer(optimizer: torch.optim.Optimizer, stem: Path) -> None:
    """Loads an optimizer's state.

    Raises:
        UserError: truncated or missing files.
    """
    try:
        load_optimizer(optimizer, stem)
    except OptimizerStateError as error:
        raise UserError(str(error)) from None


def load_selector_state(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """What the checkpoint's strategy selector had learned, or None.

    Raises:
        UserError: when it is there but broken.
    """
    path = checkpoint.path / "selector.json"
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: truncated ({error}); delete it to learn anew") from None


def keep_first_lines(path: Path, steps_done: int) -> None:
    """Drops the lines of ``path`` (JSON with a "step" each) that belong to steps after the checkpoint, and a cut-off last line."""
    if not path.is_file():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            if json.loads(line)["step"] < steps_done:
                kept.append(line + "\n")
        except json.JSONDecodeError:
            continue
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(kept), encoding="utf-8")
    temporary.rename(path)
