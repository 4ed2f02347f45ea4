"""Matrix products with packed weights, on the CPU's matrix units (AMX) or its vector units."""

from __future__ import annotations

import ctypes
import functools

import torch

from paceline.rollout.native.build import NativeUnavailable, build_library

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

    def pack(self, weight: torch.Tensor) -> torch.Tensor:
        """Returns a bfloat16 weight [outputs, inputs] with its numbers reordered for the matrix units."""
        weight = weight.contiguous()
        packed = torch.empty_like(weight)
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
        library = ctypes.CDLL(str(build_library()))
    except (NativeUnavailable, OSError):
        return None
    return PackedProducts(library)
