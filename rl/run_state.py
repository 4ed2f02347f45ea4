"""A run on disk: one whole checkpoint, replaced atomically, and what it takes to go on from it."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import PreTrainedModel

from drafter_trainer.checkpoint import save_drafter
from drafter_trainer.optimizer_state import OptimizerStateError, read_state, save_optimizer, write_state
from rl.errors import UserError
from rl.lora import save_adapters
from rl.policies import copy_tokenizer
from rl.sharding import Trained, WholeState
from rollout.drafters.eagle3_model import Eagle3Model
from rollout.strategy import Selector


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
    state_of_policy: WholeState,
    drafter: Eagle3Model | None,
    drafter_optimizer: torch.optim.Optimizer | None,
    selector: dict[str, Any] | None,
    state_of_critic: WholeState | None = None,
    lengths: dict[str, torch.Tensor] | None = None,
    adapters: dict[str, torch.Tensor] | None = None,
    state: dict[str, Any] | None = None,
) -> None:
    """Writes ``checkpoint/`` of a run beside the old one, then swaps them by renaming: at every instant one whole one exists.

    Args:
        run: The run's directory.
        steps_done: Whole steps behind it.
        policy: Whose config is kept.
        tokenizer_from: Directory with its tokenizer.
        state_of_policy: Its whole weights under the names they have without adapters, and what is trained of it.
        drafter, drafter_optimizer: None before there are.
        selector: The strategy selector's state.
        state_of_critic: Where the recipe has one.
        lengths: The length predictor's weights, where the recipe has one.
        adapters: Weights of adapters by their names in the policy, where the recipe has them.
        state: What else a run had come to.

    Raises:
        UserError: when the disk is full or not writable; the previous checkpoint stays.
    """
    building, final, old = run / "checkpoint.new", run / "checkpoint", run / "checkpoint.old"
    try:
        shutil.rmtree(building, ignore_errors=True)
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


def save_drafting(
    folder: Path, drafter: Eagle3Model | None, optimizer: torch.optim.Optimizer | None, selector: dict[str, Any] | None
) -> None:
    """Writes what speculation has learned: the drafter with its optimizer, and the selector's state. Errors come as they are."""
    if drafter is not None and optimizer is not None:
        save_drafter(drafter, folder / "drafter", torch.float32)
        save_optimizer(optimizer, folder / "drafter_optimizer")
    if selector is not None:
        (folder / "selector.json").write_text(json.dumps(selector))


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


def restore_moments(trained: Trained, stem: Path) -> None:
    """Loads an optimizer's state, wherever its parts lie now and lay then. Collective.

    Raises:
        UserError: truncated or missing files, or those of another optimizer.
    """
    try:
        trained.load_optimizer_state(read_state(stem))
    except OptimizerStateError as error:
        raise UserError(str(error)) from None
    except ValueError as error:
        raise UserError(f"{stem}: of another optimizer ({error}); resume with the recipe of the run") from None


def restore_selector(checkpoint: Checkpoint, selector: Selector) -> None:
    """Goes on from what the checkpoint's strategy selector had learned, where it has one.

    Raises:
        UserError: when it is there but broken, or of another selector.
    """
    path = checkpoint.path / "selector.json"
    if not path.is_file():
        return
    try:
        selector.load_state(json.loads(path.read_text()))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: truncated ({error}); delete it to learn anew") from None
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None


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
