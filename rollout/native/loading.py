"""Chooses the decode kernels of a device: compiled ones on a CPU, Triton's on a GPU."""

from __future__ import annotations

import functools
import logging
from typing import TYPE_CHECKING, TypeAlias

import torch

from paceline.rollout.native.build import NativeUnavailable, open_library
from paceline.rollout.native.kernels import Kernels

if TYPE_CHECKING:
    from paceline.rollout.native.triton_kernels import TritonKernels

AnyKernels: TypeAlias = "Kernels | TritonKernels"

_log = logging.getLogger(__name__)


@functools.cache
def load_kernels(device_type: str, dtype: torch.dtype) -> AnyKernels | None:
    """Returns the kernels for a device and dtype, built on the first call.

    Returns None where there are none; a failed build is logged.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        return None
    try:
        if device_type == "cuda":
            from paceline.rollout.native.triton_kernels import TritonKernels

            return TritonKernels()
        return Kernels(open_library(), dtype) if device_type == "cpu" else None
    except (NativeUnavailable, ImportError) as error:
        _log.warning("decoding with torch's operators, which are slower: %s", error)
        return None


def load_cpu_kernels(device_type: str, dtype: torch.dtype) -> Kernels | None:
    """Returns the compiled kernels for a device and dtype, or None where there are none."""
    kernels = load_kernels(device_type, dtype)
    return kernels if isinstance(kernels, Kernels) else None
