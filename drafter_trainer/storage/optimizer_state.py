"""Reads and writes AdamW's state as safetensors and JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from paceline.drafter_trainer.errors import OptimizerStateError, one_line

_MOMENTS = ("exp_avg", "exp_avg_sq")


def save_optimizer(optimizer: torch.optim.Optimizer, stem: Path) -> None:
    """Writes an optimizer's state to ``stem``.safetensors (tensors) and ``stem``.json (the rest)."""
    write_state(optimizer.state_dict(), stem)


def write_state(state: dict[str, Any], stem: Path) -> None:
    """Writes a state dict to ``stem``.safetensors (tensors) and ``stem``.json (the rest)."""
    tensors: dict[str, torch.Tensor] = {}
    scalars: dict[str, Any] = {}
    for index, entries in state["state"].items():
        for name, value in entries.items():
            key = f"{index}.{name}"
            if isinstance(value, torch.Tensor):
                tensors[key] = value.contiguous()
            else:
                scalars[key] = value
    save_file(tensors, stem.with_suffix(".safetensors"), metadata={"format": "pt"})
    stem.with_suffix(".json").write_text(
        json.dumps({"scalars": scalars, "param_groups": state["param_groups"]})
    )


def read_state(stem: Path) -> dict[str, Any]:
    """Reads what `write_state` wrote; `check_moments` checks whether it fits an optimizer.

    Raises:
        OptimizerStateError: The files are missing, truncated or malformed.
    """
    try:
        tensors = load_file(stem.with_suffix(".safetensors"))
        rest = json.loads(stem.with_suffix(".json").read_text(encoding="utf-8"))
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        reason = one_line(error, 160)
        raise OptimizerStateError(
            f"{stem}: truncated or missing ({reason}); resume from another checkpoint"
        ) from None
    scalars, groups = (
        (rest.get("scalars"), rest.get("param_groups")) if isinstance(rest, dict) else (None, None)
    )
    if (
        not isinstance(scalars, dict)
        or not isinstance(groups, list)
        or not all(isinstance(group, dict) for group in groups)
    ):
        raise OptimizerStateError(
            f"{stem}.json: not an optimizer's scalars and param_groups; resume from another checkpoint"
        )
    state: dict[int, dict[str, Any]] = {}
    for key, value in [*tensors.items(), *scalars.items()]:
        index, _, name = key.partition(".")
        if not index.isdecimal() or not name:
            raise OptimizerStateError(
                f"{stem}: {key[:60]!r} is not a parameter's number and a name; resume from another checkpoint"
            )
        state.setdefault(int(index), {})[name] = value
    return {"state": state, "param_groups": groups}


def check_moments(entries: Mapping[int, Mapping[str, Any]], shapes: Sequence[torch.Size]) -> None:
    """Checks that AdamW can continue from a state; a parameter that never had a gradient has no entry.

    Args:
        entries: ``state`` of a state dict.
        shapes: Shapes of the optimizer's parameters, in order.

    Raises:
        ValueError: The state belongs to other parameters, or holds values that AdamW cannot have produced.
    """
    if max(entries, default=-1) >= len(shapes):
        raise ValueError(f"it has {max(entries) + 1} parameters, not {len(shapes)}")
    for index, entry in entries.items():
        problem = _problem(entry, shapes[index])
        if problem is not None:
            raise ValueError(f"parameter {index}: {problem}")


def _problem(entry: Mapping[str, Any], shape: torch.Size) -> str | None:
    """Returns why an entry cannot belong to a parameter of this shape; None if it can."""
    missing = [name for name in ("step", *_MOMENTS) if name not in entry]
    if missing:
        return f"it has no {missing[0]}"
    for name, value in entry.items():
        if name == "step":
            number = float(value) if _is_number(value) else math.nan
            if not (math.isfinite(number) and number >= 0):
                return "step is not a number from 0"
        elif not isinstance(value, torch.Tensor) or not value.is_floating_point():
            return (
                f"{name} is a {value.dtype if isinstance(value, torch.Tensor) else type(value).__name__}, "
                f"not floating-point"
            )
        elif value.shape != shape:
            return f"{name} has the shape {tuple(value.shape)}, not {tuple(shape)}"
        elif not bool(value.isfinite().all()):
            return f"{name} has NaN or infinite values"
    return "exp_avg_sq has values below zero" if bool((entry["exp_avg_sq"] < 0).any()) else None


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex()
    return isinstance(value, int | float) and not isinstance(value, bool)


def take_over_moments(optimizer: torch.optim.Optimizer, state: Mapping[str, Any]) -> None:
    """Loads the moments of a state dict into an optimizer, which keeps its own learning rate and settings.

    Raises:
        ValueError: The state belongs to another optimizer; this one has not changed.
    """
    own = optimizer.state_dict()["param_groups"]
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    check_moments(state["state"], [p.shape for p in parameters])
    optimizer.load_state_dict({"state": dict(state["state"]), "param_groups": own})


def load_optimizer(optimizer: torch.optim.Optimizer, stem: Path) -> None:
    """Restores the moments that `save_optimizer` wrote.

    Raises:
        OptimizerStateError: The files are missing, truncated or malformed, or belong to another optimizer.
    """
    try:
        take_over_moments(optimizer, read_state(stem))
    except ValueError as error:
        raise OptimizerStateError(
            f"{stem}: of another optimizer ({error}); resume from another checkpoint"
        ) from None
