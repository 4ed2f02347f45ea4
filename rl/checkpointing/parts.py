"""The files of a checkpoint: the policy, its critic, and what speculation has learned."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import PreTrainedModel

from paceline.drafter_trainer.storage.checkpoint import save_drafter
from paceline.drafter_trainer.storage.ensemble import EnsembleState, write_ensemble
from paceline.drafter_trainer.storage.optimizer_state import save_optimizer, write_state
from paceline.rl.checkpointing.checkpoint import Checkpoint
from paceline.rl.errors import UserError
from paceline.rl.models.loading import copy_tokenizer
from paceline.rl.models.lora import save_adapters
from paceline.rl.process.files import read_object
from paceline.rl.sharding import FullState
from paceline.rollout.drafters.eagle3_model import Eagle3Model
from paceline.rollout.strategy import Selector


def write_policy(
    folder: Path,
    policy: PreTrainedModel,
    tokenizer_from: Path,
    state: FullState,
    adapters: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes the policy, its tokenizer, its optimizer, and its adapters where it has any.

    Args:
        folder: The checkpoint's directory.
        policy: The module whose config is kept.
        tokenizer_from: Directory with the policy's tokenizer.
        state: Whole weights under the names that they have without adapters, and the optimizer's state.
        adapters: Weights of adapters by their names in the policy.
    """
    policy.save_pretrained(folder / "policy", state_dict=state.weights)
    copy_tokenizer(tokenizer_from, folder / "policy")
    write_state(state.optimizer, folder / "optimizer")
    if adapters is not None:
        save_adapters(policy, adapters, folder / "adapter")


def write_critic(folder: Path, state: FullState) -> None:
    """Writes the critic's whole weights and its optimizer's state."""
    save_file(state.weights, folder / "critic.safetensors")
    write_state(state.optimizer, folder / "critic_optimizer")


def write_lengths(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Writes the weights of the length predictor."""
    save_file(weights, folder / "lengths.safetensors")


def write_speculation(
    folder: Path,
    drafter: Eagle3Model | None,
    optimizer: torch.optim.Optimizer | None,
    selector: dict[str, Any] | None,
    ensemble: EnsembleState | None = None,
) -> None:
    """Writes what speculation has learned.

    Args:
        folder: The checkpoint's directory.
        drafter: The drafter that is served; None before there is one.
        optimizer: The drafter's optimizer; None before there is one.
        selector: The state of the strategy selector, or None.
        ensemble: The drafters that are trained side by side; None for a single one.
    """
    if drafter is not None and optimizer is not None:
        save_drafter(drafter, folder / "drafter", torch.float32)
        save_optimizer(optimizer, folder / "drafter_optimizer")
    if ensemble is not None:
        write_ensemble(ensemble, folder / "drafter_ensemble")
    if selector is not None:
        (folder / "selector.json").write_text(json.dumps(selector))


def restore_selector(checkpoint: Checkpoint, selector: Selector) -> str | None:
    """Restores what a checkpoint's strategy selector had learned.

    Returns:
        A line when the checkpoint's state cannot be read, and the selector learns anew; otherwise None.
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
    """Raises ValueError for numbers that are not finite, which no measurement gives."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _check_leaves(inner)
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"a measured number is {value}")
