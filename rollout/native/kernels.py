"""The native kernels on tensors."""

from __future__ import annotations

import ctypes
import functools
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rollout.native.build import NativeUnavailable, build_library

_LANES = 16
_HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)
_log = logging.getLogger(__name__)

_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Layout(ctypes.Structure):
    _fields_ = [(name, _int) for name in ("tokens", "sequences", "heads", "kv_heads", "dim", "slots", "span")] + [
        (name, _pointer) for name in ("token_slots", "positions", "offsets")
    ]


class RaggedTokens:
    """The tokens of a forward, sequence after sequence, without padding.

    Args:
        slots: Slot of each of the S sequences.
        starts: Position of its first token here.
        counts: How many tokens it has here, at least 1.

    Attributes:
        token_slots: int64 [N].
        positions: int64 [N].
        offsets: int64 [S + 1], index of each sequence's first token.
    """

    def __init__(self, slots: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> None:
        number = np.asarray(counts, dtype=np.int64)
        offsets = np.concatenate([[0], number.cumsum()])
        self.offsets = torch.from_numpy(offsets)
        self.token_slots = torch.from_numpy(np.repeat(np.asarray(slots, dtype=np.int64), number))
        shift = np.repeat(np.asarray(starts, dtype=np.int64) - offsets[:-1], number)
        self.positions = torch.from_numpy(np.arange(offsets[-1]) + shift)
        self._layouts: dict[tuple[int, torch.Size], _Layout] = {}

    def layout(self, heads: int, cache: torch.Size) -> ctypes.Structure:
        """The kernels' description of these tokens over a cache of shape [2, slots, KV, span, d]; made once for all layers."""
        key = heads, cache
        if key not in self._layouts:
            _, slots, kv_heads, span, dim = cache
            sizes = len(self.positions), len(self.offsets) - 1, heads, kv_heads, dim, slots, span
            arrays = (self.token_slots, self.positions, self.offsets)
            self._layouts[key] = _Layout(*sizes, *(x.data_ptr() for x in arrays))
        return self._layouts[key]


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
        self._rotate_and_store.argtypes = [_pointer] * 5 + [_float] + [_pointer] * 3
        self._attend = getattr(library, f"paceline_attend_{suffix}")
        self._attend.argtypes = [_pointer] * 4 + [_float, _float, _int]
        self._draw = getattr(library, f"paceline_draw_{suffix}")
        self._draw.argtypes = [_pointer, _int, _int] + [_pointer] * 4

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
        tokens: RaggedTokens,
        cache: torch.Tensor,
    ) -> torch.Tensor:
        """Norms and rotates the heads of queries and keys; writes keys and values to their places.

        Args:
            joined: [1, N, (H + 2 KV) · d], queries, keys and values side by side.
            rotary: cos and sin [1, N, d].
            gains: Of the query and key norms [d], or None.
            eps: Of those norms.
            tokens: Where the N tokens stand.
            cache: [2, slots, KV, span, d].

        Returns:
            Queries [1, N, H, d].
        """
        joined = joined.contiguous()
        kv_heads, dim = cache.shape[2], cache.shape[4]
        heads = joined.shape[-1] // dim - 2 * kv_heads
        query = joined.new_empty((1, joined.shape[1], heads, dim))
        cos, sin = rotary
        query_gain, key_gain = (None, None) if gains is None else (gains[0].data_ptr(), gains[1].data_ptr())
        self._rotate_and_store(
            joined.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            query_gain,
            key_gain,
            eps,
            query.data_ptr(),
            cache.data_ptr(),
            ctypes.addressof(tokens.layout(heads, cache.shape)),
        )
        return query

    def attend(self, query: torch.Tensor, cache: torch.Tensor, tokens: RaggedTokens, rule: AttentionRule) -> torch.Tensor:
        """Each query attends to the keys of its slot at positions up to its own.

        Args:
            query: [1, N, H, d].
            cache: [2, slots, KV, span, d].
            tokens: Where the N tokens stand.
            rule: Scale, softcap and window.

        Returns:
            [1, N, H · d].
        """
        _, count, heads, dim = query.shape
        out = query.new_empty((1, count, heads * dim))
        layout = ctypes.addressof(tokens.layout(heads, cache.shape))
        self._attend(query.data_ptr(), cache.data_ptr(), out.data_ptr(), layout, rule.scale, rule.softcap, rule.window)
        return out

    def draw(self, logits: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Draws one token a row from softmax(logits / temperature) in one pass; at temperature 0 the first of the largest.

        Args:
            logits: [R, V].
            temperatures: float32 [R].
            uniforms: float64 [R] in [0, 1).

        Returns:
            int64 [R] tokens and float32 [R] log-probs (at temperature 1 where the temperature is 0); NaN for a row that has
            a NaN or infinite logit.
        """
        logits = logits.contiguous()
        rows, vocab = logits.shape
        tokens, logprobs = torch.empty(rows, dtype=torch.long), torch.empty(rows)
        arrays = (temperatures, uniforms, tokens, logprobs)
        self._draw(logits.data_ptr(), rows, vocab, *(x.data_ptr() for x in arrays))
        return tokens, logprobs


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
