"""An optimizer's state as safetensors and JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file


class OptimizerStateError(Exception):
    """Files that cannot be used: one line with the stem and what is wrong."""


def save_optimizer(optimizer: torch.optim.Optimizer, stem: Path) -> None:
    """Writes ``stem``.safetensors (tensors) and ``stem``.json (the rest)."""
    write_state(optimizer.state_dict(), stem)


def write_state(state: dict[str, Any], stem: Path) -> None:
    """The same of a state dict."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            key = f"{index}.{name}"
            if isinstance(value, torch.Tensor):
                tensors[key] = value.contiguous()
            else:
                scalars[key] = value
    save_file(tensors, stem.with_suffix(".safetensors"))
    stem.with_suffix(".json").write_text(json.dumps({"scalars": scalars, "param_groups": state["param_groups"]}))


def read_state(stem: Path) -> dict[str, Any]:
    """What `write_state` wrote.

    Raises:
        OptimizerStateError: truncated or missing files.
    """
    try:
        tensors = load_file(stem.with_suffix(".safetensors"))
        rest = json.loads(stem.with_suffix(".json").read_text())
    except (SafetensorError, OSError, json.JSONDecodeError) as error:
        raise OptimizerStateError(f"{stem}: truncated or missing ({error}); resume from another checkpoint") from None
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *rest["scalars"].items()]:
        index, _, name = key.partition(".")
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": rest["param_groups"]}


def load_optimizer(optimizer: torch.optim.Optimizer, stem: Path) -> None:
    """Restores what `save_optimizer` wrote.

    Raises:
        OptimizerStateError: truncated or missing files, or those of another optimizer.
    """
    try:
        optimizer.load_state_dict(read_state(stem))
    except ValueError as error:
        raise OptimizerStateError(f"{stem}: of another optimizer ({error})") from None
