"""Python bindings of the native backward passes, which an update on a CPU computes in bfloat16."""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from paceline.rollout.native.build import GRADIENTS_SOURCE, NativeUnavailable, open_library
from paceline.rollout.native.decoder_layer import AttentionRule

_BLOCK = 32  # kPanel and kStep in product_rows.h
_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Pieces(ctypes.Structure):
    """Mirrors `Pieces` in gradients.h."""

    _fields_ = [("prompts", _int), ("offsets", _pointer), ("starts", _pointer)]


class _Heads(ctypes.Structure):
    """Mirrors `Heads` in gradients.h."""

    _fields_ = [
        *((name, _int) for name in ("heads", "kv_heads")),
        *((name, _pointer) for name in ("joined", "cosines", "sines", "query_gain", "key_gain")),
        ("eps", _float),
    ]


class Pieces:
    """Describes packed sequences: prompts one after the other, each followed by its samples.

    Args:
        lengths: For each prompt, its number of tokens and those of its samples.
    """

    def __init__(self, lengths: Sequence[Sequence[int]]) -> None:
        counts = [len(row) for row in lengths]
        flat = [length for row in lengths for length in row]
        self._offsets = torch.tensor([0, *itertools.accumulate(counts)])
        self._starts = torch.tensor([0, *itertools.accumulate(flat)])
        self.prompts = len(lengths)

    @property
    def address(self) -> ctypes.Structure:
        """The struct that describes the pieces to the kernels; valid while this object lives."""
        return _Pieces(self.prompts, self._offsets.data_ptr(), self._starts.data_ptr())


@dataclass(frozen=True, slots=True)
class HeadsInput:
    """What an attention layer's forward started from.

    Attributes:
        joined: Queries, keys and values side by side as the projections left them, bfloat16 [T, (H + 2 KV) ·
            d].
        rotary: cos and sin, bfloat16 [T, d] each.
        gains: Gains [d] of the query and key norms, or None if there are none.
        eps: Epsilon of those norms.
        heads: Number H of query heads.
    """

    joined: torch.Tensor
    rotary: tuple[torch.Tensor, torch.Tensor]
    gains: tuple[torch.Tensor, torch.Tensor] | None
    eps: float
    heads: int


class GradientKernels:
    """Computes gradients of bfloat16 activations in float32; all tensors are contiguous and on the CPU."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._pack_transposed = library.paceline_pack_transposed
        self._pack_transposed.argtypes = [_pointer, _int, _int, _pointer]
        self._weight_gradient = library.paceline_weight_gradient
        self._weight_gradient.argtypes = [_pointer, _int, _pointer, _int, _int, _pointer]
        self._norm_backward = library.paceline_norm_backward
        self._norm_backward.argtypes = [*[_pointer] * 3, _int, _int, _float, *[_pointer] * 3]
        self._gate_backward = library.paceline_gate_backward
        self._gate_backward.argtypes = [_pointer, _pointer, _int, _int, _pointer]
        self._attention_backward = library.paceline_attention_backward
        self._attention_backward.argtypes = [_int, _pointer, _pointer, _float, _float, _int, *[_pointer] * 3]
        self._score = library.paceline_score
        self._score.argtypes = [_pointer, _int, _int, _pointer, _float, *[_pointer] * 3]
        self._score_backward = library.paceline_score_backward
        self._score_backward.argtypes = [_pointer, _int, _int, _pointer, _float, *[_pointer] * 4]

    def pack_transposed(self, matrix: torch.Tensor, packed: torch.Tensor | None = None) -> torch.Tensor:
        """Packs the transpose of a matrix, for products that sum over its rows.

        Args:
            matrix: bfloat16 [rows, columns].
            packed: Where to write it, what an earlier call with such a matrix returned; None allocates it.

        Returns:
            bfloat16 [columns, rows rounded up to whole blocks], its numbers in the order of
            `PackedProducts.pack`; columns must be whole panels.
        """
        rows, columns = matrix.shape
        if packed is None:
            packed = matrix.new_empty(columns, -(-rows // _BLOCK) * _BLOCK)
        self._pack_transposed(matrix.data_ptr(), rows, columns, packed.data_ptr())
        return packed

    def add_weight_gradient(self, of_output: torch.Tensor, inputs: torch.Tensor, total: torch.Tensor) -> None:
        """Adds of_outputᵀ · inputs to ``total``, float32 [outputs, inputs], in place.

        Args:
            of_output: Gradient of the outputs after `pack_transposed`, or whole panels of its rows.
            inputs: Inputs after `pack_transposed`.
            total: Contiguous sum to add to.
        """
        steps = inputs.shape[1] // _BLOCK
        self._weight_gradient(
            of_output.data_ptr(), len(of_output), inputs.data_ptr(), len(inputs), steps, total.data_ptr()
        )

    def norm_backward(
        self, x: torch.Tensor, gain: torch.Tensor, eps: float, of_output: torch.Tensor, grad: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds the gradient of a root-mean-square norm's input to ``grad``, in place.

        Args:
            x: Input of the norm, bfloat16 [T, width].
            gain: Its gain, bfloat16 [width].
            eps: Its epsilon.
            of_output: Gradient of its output, bfloat16 [T, width].
            grad: Gradient to add to, float32 [T, width].

        Returns:
            The sum in bfloat16 [T, width], and the gradient of the gain, float32 [width].
        """
        rounded, of_gain = torch.empty_like(x), torch.empty(len(gain))
        arrays = (x, gain, of_output)
        self._norm_backward(
            *(a.data_ptr() for a in arrays),
            *x.shape,
            eps,
            grad.data_ptr(),
            rounded.data_ptr(),
            of_gain.data_ptr(),
        )
        return rounded, of_gain

    def gate_backward(self, x: torch.Tensor, of_output: torch.Tensor) -> torch.Tensor:
        """Returns the gradient of `Kernels.silu_gate`'s input ``x`` [T, 2 · width], bfloat16."""
        out = torch.empty_like(x)
        self._gate_backward(x.data_ptr(), of_output.data_ptr(), *of_output.shape, out.data_ptr())
        return out

    def attention_backward(
        self, heads: HeadsInput, pieces: Pieces, rule: AttentionRule, of_output: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Computes gradients through attention, rotation and head norms.

        Args:
            heads: What the forward started from.
            pieces: The packed sequences.
            rule: Scale, soft cap and window.
            of_output: Gradient of the attention's output, bfloat16 [T, H · d].

        Returns:
            Gradient of ``heads.joined``, and those of the gains of the query and key norms, float32 [2, d].
        """
        cos, sin = heads.rotary
        dim = cos.shape[-1]
        kv_heads = (heads.joined.shape[-1] // dim - heads.heads) // 2
        gains = (
            (None, None) if heads.gains is None else (heads.gains[0].data_ptr(), heads.gains[1].data_ptr())
        )
        struct = _Heads(
            heads.heads, kv_heads, heads.joined.data_ptr(), cos.data_ptr(), sin.data_ptr(), *gains, heads.eps
        )
        described = pieces.address
        out, of_gains = torch.empty_like(heads.joined), torch.zeros(pieces.prompts * kv_heads, 2, dim)
        self._attention_backward(
            dim,
            ctypes.addressof(struct),
            ctypes.addressof(described),
            rule.scale,
            rule.softcap,
            rule.window,
            of_output.data_ptr(),
            out.data_ptr(),
            of_gains.data_ptr(),
        )
        return out, of_gains.sum(0)

    def score(
        self, logits: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Computes log-probs of targets as `Kernels.draw` does, bit for bit, and entropies.

        Args:
            logits: Logits, bfloat16 [M, V].
            targets: Token ids, int64 [M].
            temperature: Temperature, above 0.

        Returns:
            Log-probs, entropies and log-normalizers of softmax(logits / temperature), float32 [M] each.
        """
        outputs = torch.empty(len(targets)), torch.empty(len(targets)), torch.empty(len(targets))
        self._score(
            logits.data_ptr(),
            *logits.shape,
            targets.data_ptr(),
            temperature,
            *(x.data_ptr() for x in outputs),
        )
        return outputs

    def score_backward(
        self,
        logits: torch.Tensor,
        targets: torch.Tensor,
        temperature: float,
        saved: tuple[torch.Tensor, torch.Tensor],
        of_outputs: tuple[torch.Tensor, torch.Tensor],
    ) -> None:
        """Replaces logits by their gradient, in place.

        Args:
            logits: Logits, bfloat16 [M, V].
            targets: Token ids, int64 [M].
            temperature: Temperature, above 0.
            saved: Entropies and log-normalizers from `score`, float32 [M] each.
            of_outputs: Gradients of log-probs and entropies, float32 [M] each.
        """
        arrays = (*saved, *of_outputs)
        self._score_backward(
            logits.data_ptr(),
            *logits.shape,
            targets.data_ptr(),
            temperature,
            *(x.data_ptr() for x in arrays),
        )


@functools.cache
def load_gradient_kernels() -> GradientKernels | None:
    """Returns the kernels, built on the first call; None without a compiler."""
    try:
        return GradientKernels(open_library(GRADIENTS_SOURCE))
    except NativeUnavailable:
        return None
