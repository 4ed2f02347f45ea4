"""Native decode kernels.

For the CPU they are built from ``kernels.cpp`` with the machine's compiler on first use; for a GPU they are
written in Triton.
"""

from paceline.rollout.native.build import NativeUnavailable
from paceline.rollout.native.decoder_layer import AttentionRule, NativeLayer, Operands
from paceline.rollout.native.device_tokens import DeviceTokens, PagedLines
from paceline.rollout.native.kernels import (
    DraftLayer,
    Int8Rows,
    Kernels,
    RaggedTokens,
)
from paceline.rollout.native.loading import AnyKernels, load_cpu_kernels, load_kernels
from paceline.rollout.native.transfer import download, upload

__all__ = [
    "AnyKernels",
    "AttentionRule",
    "DeviceTokens",
    "DraftLayer",
    "Int8Rows",
    "Kernels",
    "NativeLayer",
    "NativeUnavailable",
    "Operands",
    "PagedLines",
    "RaggedTokens",
    "download",
    "load_cpu_kernels",
    "load_kernels",
    "upload",
]
