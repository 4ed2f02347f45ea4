"""Uploads to a GPU that the host does not wait for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch


def upload(values: np.ndarray | torch.Tensor | Sequence[Any], device: torch.device) -> torch.Tensor:
    """Returns values of the host as a tensor on ``device``.

    A copy from pageable memory makes the host wait until the GPU has reached it; one from pinned memory does
    not.

    Args:
        values: Array, CPU tensor or (nested) sequence of numbers.
        device: Device of the result.
    """
    tensor = torch.as_tensor(values)
    if device.type != "cuda" or tensor.device.type == "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
