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
        rest = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise OptimizerStateError(f"{stem}: truncated or missing ({error}); resume from another checkpoint") from None
    state: dict[int, dict[str, Any]] = {}
    try:
        groups = [_checked_group(group) for group in rest["param_groups"]]
        for key, value in [*tensors.items(), *rest["scalars"].items()]:
            index, _, name = key.partition(".")
            state.setdefault(int(index), {})[name] = value
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise OptimizerStateError(
            f"{stem}: not an optimizer's state ({type(error).__name__}: {error}); resume from another checkpoint"
        ) from None
    return {"state": state, "param_groups": groups}


def _checked_group(group: dict[str, Any]) -> dict[str, Any]:
    """Refuses with ValueError or TypeError what no AdamW has written: ``params`` numbers, every setting a number, a truth value, a
    pair of numbers, or None."""
    for name, value in group.items():
        values = value if isinstance(value, list) else [value]
        if name == "params" and not all(type(v) is int for v in values):
            raise ValueError("params are not numbers")
        if not all(v is None or isinstance(v, int | float) for v in values):
            raise ValueError(f"{name} is {value!r:.40}")
    return {**group, "params": list(group["params"]), "lr": float(group["lr"])}


def load_optimizer(optimizer: torch.optim.Optimizer, stem: Path) -> None:
    """Restores what `save_optimizer` wrote.

    Raises:
        OptimizerStateError: truncated or missing files, or those of another optimizer.
    """
    try:
        state = read_state(stem)
        check_shapes(state, [p for group in optimizer.param_groups for p in group["params"]])
        optimizer.load_state_dict(state)
    except (KeyError, TypeError, ValueError) as error:
        raise OptimizerStateError(f"{stem}: of another optimizer ({error})") from None


def check_shapes(state: dict[str, Any], parameters: list[torch.nn.Parameter]) -> None:
    """Compares the moments of a state dict with the parameters that they belong to; AdamW itself finds out at its next step.

    Raises:
        ValueError: where a moment has another shape, or belongs to no parameter.
    """
    for index, entry in state["state"].items():
        if not 0 <= index < len(parameters):
            raise ValueError(f"it has moments of parameter {index}, there are {len(parameters)} parameters")
        for name, value in entry.items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameters[index].shape:
                raise ValueError(f"{name} has the shape {tuple(value.shape)}, not {tuple(parameters[index].shape)}")
