"""The weights of a decoder layer in the form that the native kernels read."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

_MOST_PARTS = 3  # layers of one input: queries, keys and values
_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


@dataclass(frozen=True, slots=True)
class AttentionRule:
    """States how attention scores become weights.

    Attributes:
        scale: Factor on the scores.
        softcap: Soft cap, ``softcap * tanh(scores / softcap)``; 0 for none.
        window: Number of keys that a query sees, itself included; 0 for all keys before it.
    """

    scale: float
    softcap: float = 0.0
    window: int = 0

    @staticmethod
    def of(arguments: dict[str, Any]) -> AttentionRule | None:
        """Returns the rule that an attention function's arguments state, or None if they state more."""
        known = {"scaling", "sliding_window", "softcap"}
        if "scaling" not in arguments or not known >= {
            name for name, value in arguments.items() if value is not None
        }:
            return None
        return AttentionRule(
            arguments["scaling"], arguments.get("softcap") or 0.0, arguments.get("sliding_window") or 0
        )


class _Projection(ctypes.Structure):
    """Mirrors `Projection` in decoder_layer.h."""

    _fields_ = [
        ("weights", _pointer * _MOST_PARTS),
        ("biases", _pointer * _MOST_PARTS),
        ("outputs", _int * _MOST_PARTS),
        *((name, _int) for name in ("count", "inputs", "packed")),
    ]


class _Rule(ctypes.Structure):
    """Mirrors `AttentionRule` in layout.h."""

    _fields_ = [("scale", _float), ("softcap", _float), ("window", _int)]


class _DecoderLayer(ctypes.Structure):
    """Mirrors `DecoderLayer` in decoder_layer.h."""

    _fields_ = [
        *((name, _Projection) for name in ("qkv", "o", "gate_up", "down")),
        *((name, _pointer) for name in ("attention_gain", "mlp_gain", "query_gain", "key_gain")),
        *((name, _float) for name in ("attention_eps", "mlp_eps", "head_eps")),
        ("rule", _Rule),
    ]


@dataclass(frozen=True, slots=True)
class Operands:
    """Holds the weights of linear layers of one input.

    Attributes:
        layers: Weight [outputs, inputs], contiguous, and bias [outputs] or None of each of at most three
            layers.
        packed: Whether the weight, then a single one, comes from `PackedProducts.pack`.
    """

    layers: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]
    packed: bool

    def struct(self) -> _Projection:
        """Returns the struct that describes the weights to the kernels."""
        weights, biases, outputs = [], [], []
        for weight, bias in self.layers:
            weights.append(weight.data_ptr())
            biases.append(None if bias is None else bias.data_ptr())
            outputs.append(len(weight))
        return _Projection(
            (_pointer * _MOST_PARTS)(*weights),
            (_pointer * _MOST_PARTS)(*biases),
            (_int * _MOST_PARTS)(*outputs),
            len(weights),
            self.layers[0][0].shape[1],
            self.packed,
        )


class Norm(Protocol):
    """A root-mean-square norm: its gain, [width] and contiguous, and its epsilon."""

    gain: torch.Tensor
    eps: float


class NativeLayer:
    """Describes a decoder layer to `Kernels.decoder_layer`, and keeps its tensors alive.

    Args:
        projections: Weights of queries, keys and values; of the attention's output; of gate and up; and of
            the down projection.
        norms: Norms before the attention and before the MLP.
        head_norms: Norms of query and key heads; empty if the layer has none.
        rule: The attention's rule.

    Attributes:
        inner: Width of all query heads together.
    """

    def __init__(
        self,
        projections: Sequence[Operands],
        norms: Sequence[Norm],
        head_norms: Sequence[Norm],
        rule: AttentionRule,
    ) -> None:
        gains = [norm.gain for norm in (*norms, *head_norms)]
        self._kept_alive = projections, gains
        self._struct = _DecoderLayer(
            *(operands.struct() for operands in projections),
            *(gain.data_ptr() for gain in gains),
            *[None] * (4 - len(gains)),
            *(norm.eps for norm in norms),
            head_norms[0].eps if head_norms else 0.0,
            _Rule(rule.scale, rule.softcap, rule.window),
        )
        self.inner = projections[1].layers[0][0].shape[1]
        self.address = ctypes.addressof(self._struct)
