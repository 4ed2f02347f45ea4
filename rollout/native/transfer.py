"""Uploads to a GPU that the host does not wait for, and downloads that it waits for once."""

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


def download(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """Returns tensors on the CPU, fetched from a GPU in a single transfer.

    What comes from a GPU is float64, which is exact for token ids and float32; all of it is on one device.
    """
    if all(t.device.type == "cpu" for t in tensors):
        return list(tensors)
    device = next(t.device for t in tensors if t.device.type != "cpu")
    joined = torch.cat([t.to(device, torch.float64).flatten() for t in tensors]).cpu()
    return [
        part.view(t.shape)
        for part, t in zip(joined.split([t.numel() for t in tensors]), tensors, strict=True)
    ]
