"""Matrix products on the CPU whose rows do not depend on each other: with packed weights, or as they lie."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch

from paceline.rollout.native.build import NativeUnavailable, open_library

PANEL, _STEP = 32, 32  # kPanel and kStep in product.h: outputs and inputs of one block
_pointer, _int = ctypes.c_void_p, ctypes.c_int64


class PackedProducts:
    """Multiplies by bfloat16 weights stored in the order in which they are read.

    A row's result depends on that row alone, bit for bit: neither on the number of rows nor on what they
    hold.
    """

    def __init__(self, library: ctypes.CDLL) -> None:
        self.on_matrix_units = bool(library.paceline_tiles())
        self._pack = library.paceline_pack_weight
        self._pack.argtypes = [_pointer, _int, _int, _pointer]
        self._multiply = library.paceline_multiply_packed
        self._multiply.argtypes = [_pointer, _int, _pointer, _int, _int, _pointer, _pointer, _pointer]

    @staticmethod
    def serves(outputs: int, inputs: int) -> bool:
        """Returns whether a weight of this shape consists of whole panels."""
        return outputs % PANEL == 0 and inputs % _STEP == 0

    def pack(self, weight: torch.Tensor, packed: torch.Tensor | None = None) -> torch.Tensor:
        """Reorders a weight's numbers for the matrix units.

        Args:
            weight: bfloat16 [outputs, inputs].
            packed: Where to write them, of the weight's shape; None allocates it.

        Returns:
            The reordered weight.
        """
        weight = weight.contiguous()
        packed = torch.empty_like(weight) if packed is None else packed
        self._pack(weight.data_ptr(), *weight.shape, packed.data_ptr())
        return packed

    def multiply(
        self, x: torch.Tensor, packed: torch.Tensor, bias: torch.Tensor | None, residual: torch.Tensor | None
    ) -> torch.Tensor:
        """Multiplies by a packed weight and adds bias and residual; rounds once.

        Args:
            x: Inputs, bfloat16 [..., inputs].
            packed: Weight from `pack`, [outputs, inputs].
            bias: Bias [outputs], or None.
            residual: Residual [..., outputs], or None.

        Returns:
            bfloat16 [..., outputs].
        """
        outputs, inputs = packed.shape
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        out = x.new_empty((*x.shape[:-1], outputs))
        extras = (None if extra is None else extra.data_ptr() for extra in (bias, residual))
        self._multiply(
            x.data_ptr(), x.numel() // inputs, packed.data_ptr(), outputs, inputs, *extras, out.data_ptr()
        )
        return out


@functools.cache
def load_products() -> PackedProducts | None:
    """Returns the products, built on the first call; None without a compiler."""
    try:
        return PackedProducts(open_library())
    except NativeUnavailable:
        return None


class DotProducts:
    """Multiplies by weights as they lie in memory.

    It serves float32, and the shapes that `PackedProducts` do not serve. A row's result depends on that row
    alone, bit for bit.

    Args:
        library: The compiled kernels.
        dtype: Dtype of inputs, weights and outputs, float32 or bfloat16; sums are float32.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        suffix = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
        self._multiply = getattr(library, f"paceline_multiply_dots_{suffix}")
        self._multiply.argtypes = [_pointer, _int, _pointer, _int, _int, _pointer, _pointer, _pointer, _int]

    def multiply(
        self,
        x: torch.Tensor,
        layers: Sequence[tuple[torch.Tensor, torch.Tensor | None]],
        residual: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Multiplies by the weights of one or more layers and adds bias and residual; rounds once.

        Args:
            x: Inputs [..., inputs].
            layers: Weight [outputs, inputs], contiguous, and bias [outputs] or None of each layer.
            residual: Residual [..., sum of outputs], or None.

        Returns:
            The layers' outputs side by side, [..., sum of outputs].
        """
        x = x.contiguous()
        residual = None if residual is None else residual.contiguous()
        inputs, stride = x.shape[-1], sum(len(weight) for weight, _ in layers)
        out = x.new_empty((*x.shape[:-1], stride))
        first = 0
        for weight, bias in layers:
            skipped = first * x.element_size()
            self._multiply(
                x.data_ptr(),
                x.numel() // inputs,
                weight.data_ptr(),
                *weight.shape,
                None if bias is None else bias.data_ptr(),
                None if residual is None else residual.data_ptr() + skipped,
                out.data_ptr() + skipped,
                stride,
            )
            first += len(weight)
        return out


@functools.cache
def load_dot_products(device_type: str, dtype: torch.dtype) -> DotProducts | None:
    """Returns the dot products for a device and dtype, built on the first call; None where there are none."""
    if device_type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None
    try:
        return DotProducts(open_library(), dtype)
    except NativeUnavailable:
        return None
