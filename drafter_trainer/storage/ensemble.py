"""Reads and writes drafters that are trained side by side, with their optimizers and their weights."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paceline.drafter_trainer.errors import DrafterError
from paceline.drafter_trainer.storage.checkpoint import load_drafter, save_drafter
from paceline.drafter_trainer.storage.json_object import read_object
from paceline.drafter_trainer.storage.optimizer_state import read_state, write_state
from paceline.rollout.drafters.eagle3_model import Eagle3Model


@dataclass(frozen=True, slots=True)
class EnsembleState:
    """Holds N drafters that are trained side by side.

    Attributes:
        weights: Weight of each drafter; they sum to 1 (`tracking_weights`).
        models: The drafters, float32.
        optimizers: State dicts of their optimizers.
    """

    weights: Sequence[float]
    models: Sequence[Eagle3Model]
    optimizers: Sequence[dict[str, Any]]


def write_ensemble(state: EnsembleState, folder: Path) -> None:
    """Writes ``weights.json``, and of the i-th drafter ``drafter-i`` and ``optimizer-i``."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, (model, optimizer) in enumerate(zip(state.models, state.optimizers, strict=True)):
        save_drafter(model, folder / f"drafter-{number}", torch.float32)
        write_state(optimizer, folder / f"optimizer-{number}")
    (folder / "weights.json").write_text(json.dumps({"weights": list(state.weights)}))


def read_ensemble(folder: Path, vocab_size: int, hidden_size: int, **requirements: Any) -> EnsembleState:
    """Reads what `write_ensemble` wrote.

    Args:
        folder: Its directory.
        vocab_size: Number of tokens of the policy's vocabulary.
        hidden_size: Size of the policy's hidden states.
        **requirements: ``tap_layers`` and ``draft_vocab_size`` of `load_drafter`.

    Raises:
        DrafterError: The weights or a drafter cannot be used.
        OptimizerStateError: An optimizer's files cannot be used.
    """
    path = folder / "weights.json"
    weights = read_object(path, DrafterError).get("weights")
    if not isinstance(weights, list) or not all(isinstance(w, float) and 0 < w <= 1 for w in weights):
        raise DrafterError(f"{path}: weights are not a list of numbers between 0 and 1")
    if not math.isclose(sum(weights), 1.0, rel_tol=1e-6):
        raise DrafterError(f"{path}: weights sum to {sum(weights):.6g}, not to 1")
    numbers = range(len(weights))
    return EnsembleState(
        weights,
        [load_drafter(folder / f"drafter-{i}", vocab_size, hidden_size, **requirements) for i in numbers],
        [read_state(folder / f"optimizer-{i}") for i in numbers],
    )
