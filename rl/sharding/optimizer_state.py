"""Conversion between AdamW's entries of single parameters and an unsharded optimizer's state dict."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from paceline.drafter_trainer.storage.optimizer_state import check_moments


def checked_moments(
    state: dict[str, Any], parameters: list[nn.Parameter], shapes: list[torch.Size]
) -> list[dict[str, Any]]:
    """Returns AdamW's entry of each parameter after checking that they fit.

    Args:
        state: State dict of an unsharded optimizer.
        parameters: The trainable parameters, which may be partitioned.
        shapes: Their full shapes.

    Raises:
        ValueError: The state belongs to other parameters.
    """
    entries = state["state"]
    if entries and len(entries) != len(parameters):
        raise ValueError(f"it has {len(entries)} parameters, not {len(parameters)}")
    check_moments(entries, shapes)
    return [entries.get(i, {}) for i in range(len(parameters))]


def as_state(entries: list[dict[str, Any]], group: dict[str, Any]) -> dict[str, Any]:
    """Returns the state dict of an optimizer with one parameter group."""
    plain = {k: v for k, v in group.items() if k != "params" and not isinstance(v, torch.Tensor)}
    state = {i: entry for i, entry in enumerate(entries) if entry}
    return {"state": state, "param_groups": [{**plain, "params": list(range(len(entries)))}]}
