"""Native decode kernels for the CPU, built from ``kernels.cpp`` with the machine's compiler on first use."""

from paceline.rollout.native.build import NativeUnavailable
from paceline.rollout.native.kernels import (
    AttentionRule,
    DraftLayer,
    Int8Rows,
    Kernels,
    RaggedTokens,
    load_kernels,
)

__all__ = [
    "AttentionRule",
    "DraftLayer",
    "Int8Rows",
    "Kernels",
    "NativeUnavailable",
    "RaggedTokens",
    "load_kernels",
]
