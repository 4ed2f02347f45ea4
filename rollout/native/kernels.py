"""The native kernels on tensors."""

from __future__ import annotations

import ctypes
import functools
import logging
from dataclasses import dataclass

import torch

from rollout.native.build import NativeUnavailable, build_library

_LANES = 16
_HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
_log = logging.getLogger(__name__)

_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Shape(ctypes.Structure):
    _fields_ = [(name, _int) for name in ("batch", "queries", "heads", "kv_heads", "dim", "slots", "span", "first_slot")]


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """How scores become weights.

    Attributes:
        scale: Factor on the scores.
        softcap: ``softcap * tanh(scores / softcap)``; 0 for none.
        window: Keys that a query sees, itself included; 0 for all before it.
    """

    scale: float
    softcap: float = 0.0
    window: int = 0


class Kernels:
    """The kernels for one dtype, on CPU tensors of that dtype. cos, sin, gains, positions and cache must be contiguous."""

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        suffix = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
        self._rms_norm = getattr(library, f"paceline_rms_norm_{suffix}")
        self._rms_norm.argtypes = [_pointer, _pointer, _pointer, _int, _int, _float]
        self._silu_gate = getattr(library, f"paceline_silu_gate_{suffix}")
        self._silu_gate.argtypes = [_pointer, _pointer, _int, _int]
        self._rotate_and_store = getattr(library, f"paceline_rotate_and_store_{suffix}")
        self._rotate_and_store.argtypes = [_pointer] * 5 + [_float] + [_pointer] * 4
        self._attend = getattr(library, f"paceline_attend_{suffix}")
        self._attend.argtypes = [_pointer] * 5 + [_float, _float, _int]

    @staticmethod
    def serve(head_dim: int, *widths: int) -> bool:
        """Whether vectors of these lengths are whole numbers of lanes, as the kernels want them."""
        return head_dim in _HEAD_DIMS and all(width % _LANES == 0 for width in widths)

    def rms_norm(self, x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
        """x: [..., width], gain: [width]."""
        x = x.contiguous()
        out = torch.empty_like(x)
        width = x.shape[-1]
        self._rms_norm(x.data_ptr(), gain.data_ptr(), out.data_ptr(), x.numel() // width, width, eps)
        return out

    def silu_gate(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., 2 · width], gate and up side by side → silu(gate) · up [..., width]."""
        x = x.contiguous()
        width = x.shape[-1] // 2
        out = x.new_empty((*x.shape[:-1], width))
        self._silu_gate(x.data_ptr(), out.data_ptr(), x.numel() // (2 * width), width)
        return out

    def rotate_and_store(
        self,
        joined: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        gains: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
        positions: torch.Tensor,
        cache: torch.Tensor,
        first_slot: int,
    ) -> torch.Tensor:
        """Norms and rotates the heads of queries and keys; writes keys and values to their places.

        Args:
            joined: [B, Q, (H + 2 KV) · d], queries, keys and values side by side.
            rotary: cos and sin [B, Q, d].
            gains: Of the query and key norms [d], or None.
            eps: Of those norms.
            positions: int64 [B, Q].
            cache: [2, slots, KV, span, d].
            first_slot: Slot of row 0.

        Returns:
            Queries [B, Q, H, d].
        """
        joined = joined.contiguous()
        shape = self._shape(joined, cache, first_slot)
        query = joined.new_empty((shape.batch, shape.queries, shape.heads, shape.dim))
        cos, sin = rotary
        query_gain, key_gain = (None, None) if gains is None else (gains[0].data_ptr(), gains[1].data_ptr())
        self._rotate_and_store(
            joined.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            query_gain,
            key_gain,
            eps,
            positions.data_ptr(),
            query.data_ptr(),
            cache.data_ptr(),
            ctypes.addressof(shape),
        )
        return query

    def attend(
        self, query: torch.Tensor, cache: torch.Tensor, positions: torch.Tensor, first_slot: int, rule: AttentionRule
    ) -> torch.Tensor:
        """Each query attends to the keys of its slot at positions up to its own.

        Args:
            query: [B, Q, H, d].
            cache: [2, slots, KV, span, d].
            positions: int64 [B, Q].
            first_slot: Slot of row 0.
            rule: Scale, softcap and window.

        Returns:
            [B, Q, H · d].
        """
        batch, queries, heads, dim = query.shape
        _, slots, kv_heads, span, _ = cache.shape
        shape = _Shape(batch, queries, heads, kv_heads, dim, slots, span, first_slot)
        out = query.new_empty((batch, queries, heads * dim))
        self._attend(
            query.data_ptr(),
            cache.data_ptr(),
            positions.data_ptr(),
            out.data_ptr(),
            ctypes.addressof(shape),
            rule.scale,
            rule.softcap,
            rule.window,
        )
        return out

    @staticmethod
    def _shape(joined: torch.Tensor, cache: torch.Tensor, first_slot: int) -> _Shape:
        batch, queries, width = joined.shape
        _, slots, kv_heads, span, dim = cache.shape
        return _Shape(batch, queries, width // dim - 2 * kv_heads, kv_heads, dim, slots, span, first_slot)


@functools.cache
def load_kernels(device_type: str, dtype: torch.dtype) -> Kernels | None:
    """The kernels for a device and dtype, built on the first call; None, with one logged line, where there are none."""
    if device_type != "cpu" or dtype not in (torch.float32, torch.bfloat16):
        return None
    try:
        return Kernels(ctypes.CDLL(str(build_library())), dtype)
    except (NativeUnavailable, OSError) as error:
        _log.warning("decoding with torch's operators, slower: %s", error)
        return None
