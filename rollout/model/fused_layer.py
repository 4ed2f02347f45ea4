"""A decoder layer with joined projections and few operators, for all models with the usual parts.

A transformers decoder layer of a Llama-like model runs about 160 operators per token. At small batches on a
CPU, half of the time goes into their dispatch rather than their arithmetic. `FusedLayer` runs the same
mathematics in one call of a native kernel; a layer with a part that this one lacks, in four matrix products
and five kernels (`paceline.rollout.native`); and where these cannot be built, in about 60 operators. It is
not written for a particular model: it is assembled from the parts that a layer *has* (`LayerParts`), and used
only if it gives the original layer's results on random weights (`paceline.rollout.model.fusion_check`). A
layer with other parts or other mathematics is left unchanged.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from transformers.activations import SiLUActivation

from paceline.rollout.model.attention import ForwardBatch, slot_attention
from paceline.rollout.model.packed_linear import (
    JoinedLinear,
    PackedLinear,
    Projection,
    joinable,
    project,
    project_gate,
)
from paceline.rollout.native import AnyKernels, AttentionRule, Kernels, NativeLayer
from paceline.rollout.transformers_api import Cache, first_instance, hidden_states_in, rotary_in

_LAYER_PARTS = {
    "self_attn",
    "mlp",
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
}
_ATTENTION_PARTS = {"q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm"}
_MLP_PARTS = {"gate_proj", "up_proj", "down_proj", "act_fn"}


@dataclass(frozen=True, slots=True)
class LayerParts:
    """Lists the parts of one decoder layer.

    Attributes:
        attention_in: Norm before the attention.
        attention_out: Norm after the attention (Gemma); None if there is none.
        mlp_in: Norm before the MLP.
        mlp_out: Norm after the MLP (Gemma); None if there is none.
        query: Norm of each query head (Qwen3, Gemma 3); None if there is none.
        key: Norm of each key head; None if there is none.
        qkv: Projections of queries, keys and values.
        o: Output projection of the attention.
        gate_up: Gate and up projections of the MLP.
        down: Down projection of the MLP.
        activation: Activation function of the gate.
    """

    attention_in: nn.Module
    attention_out: nn.Module | None
    mlp_in: nn.Module
    mlp_out: nn.Module | None
    query: nn.Module | None
    key: nn.Module | None
    qkv: tuple[nn.Linear, ...]
    o: nn.Linear
    gate_up: tuple[nn.Linear, ...]
    down: nn.Linear
    activation: Callable[[torch.Tensor], torch.Tensor]

    @staticmethod
    def of(layer: Any) -> LayerParts | None:
        """Returns the parts of a layer that has exactly these under transformers' names, or None."""
        attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
        if attention is None or mlp is None or not _children(layer) <= _LAYER_PARTS:
            return None
        if not (_children(attention) <= _ATTENTION_PARTS and _children(mlp) <= _MLP_PARTS):
            return None
        try:
            qkv = (attention.q_proj, attention.k_proj, attention.v_proj)
            gate_up = (mlp.gate_proj, mlp.up_proj)
            four_norms = hasattr(layer, "pre_feedforward_layernorm")
            parts = LayerParts(
                attention_in=layer.input_layernorm,
                attention_out=layer.post_attention_layernorm if four_norms else None,
                mlp_in=layer.pre_feedforward_layernorm if four_norms else layer.post_attention_layernorm,
                mlp_out=layer.post_feedforward_layernorm if four_norms else None,
                query=getattr(attention, "q_norm", None),
                key=getattr(attention, "k_norm", None),
                qkv=qkv,
                o=attention.o_proj,
                gate_up=gate_up,
                down=mlp.down_proj,
                activation=mlp.act_fn,
            )
        except AttributeError:
            return None
        all_joinable = joinable(qkv) and joinable(gate_up) and joinable([parts.o]) and joinable([parts.down])
        return parts if all_joinable and (parts.query is None) == (parts.key is None) else None


def _children(module: nn.Module) -> set[str]:
    """Returns the names of a module's direct children."""
    return {name for name, _ in module.named_children()}


class RootMeanSquareNorm:
    """Computes x · rsqrt(mean(x²) + ε) · gain (Zhang and Sennrich, arXiv 1910.07467, equation 4).

    ε is added as in every Llama-like model.

    Args:
        norm: Module that computes this, whose gain is its ``weight`` (Llama) or 1 + ``weight`` (Gemma); the
            constructor finds out which by calling it.
        dtype: Compute dtype.
        kernels: Native kernels, or None for torch's operator.

    Raises:
        ValueError: The module computes something else.
    """

    def __init__(self, norm: nn.Module, dtype: torch.dtype, kernels: AnyKernels | None) -> None:
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        weight = getattr(norm, "weight", None)
        if not isinstance(eps, float) or not isinstance(weight, torch.Tensor):
            raise ValueError(f"{type(norm).__name__} has no epsilon or no weight")
        self.eps = eps
        self._weight, self._dtype, self._kernels = weight, dtype, kernels
        self._shape = tuple(weight.shape)
        self._offset = self._find_offset(norm)
        self._shared = self._offset == 0 and weight.dtype == dtype
        self.gain = torch.empty_like(weight, dtype=dtype).detach()
        self.refresh()

    def _find_offset(self, norm: nn.Module) -> float:
        """Returns what the norm adds to its weight to get the gain, found by calling it: 0 or 1."""
        weight = self._weight
        x = torch.ones(1, *self._shape, device=weight.device, dtype=weight.dtype)
        gain = norm(x)[0].float() * (1 + self.eps) ** 0.5
        for offset in (0.0, 1.0):
            if torch.allclose(gain, weight.float() + offset, rtol=0.02, atol=1e-3):
                return offset
        raise ValueError(f"{type(norm).__name__} is not a root-mean-square norm")

    @torch.no_grad()
    def refresh(self) -> None:
        """Reads the gain again, in place because captured graphs hold its address.

        A gain shared with the trainer is looked up anew, since wrapping a module for training may move its
        parameters.
        """
        if self._shared:
            self.gain = self._weight.detach()
        else:
            self.gain.copy_(self._weight.float() + self._offset)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalizes ``x`` [..., width]."""
        if self._kernels is not None:
            return self._kernels.rms_norm(x, self.gain, self.eps)
        return nn.functional.rms_norm(x, self._shape, self.gain, self.eps)

    def after(
        self, layers: Projection, x: torch.Tensor, residual: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Applies linear layers to ``x`` [B, Q, in] and adds ``residual``; returns the sum and its norm."""
        if self._kernels is None or isinstance(self._kernels, Kernels):
            out = layers(x, residual)
            return out, self(out)
        return self._kernels.add_norm(project(layers, x, self._kernels), residual, self.gain, self.eps)


class FusedLayer(nn.Module):
    """Runs one decoder layer in few operators; takes what transformers' decoder models pass to their layers.

    Args:
        parts: Parts of the trainer's layer.
        index: Index of the layer, for the cache.
        attention: Keyword arguments that the original layer passes to its attention function (scaling,
            sliding window, …).
        dtype: Compute dtype.
        packed: Whether the linear layers are packed copies.
        kernels: Native kernels that support this layer's widths, or None for torch operators.
    """

    def __init__(
        self,
        parts: LayerParts,
        index: int,
        attention: dict[str, Any],
        dtype: torch.dtype,
        packed: bool,
        kernels: AnyKernels | None,
    ) -> None:
        super().__init__()

        def norm(module: nn.Module, heads: bool = False) -> RootMeanSquareNorm:
            return RootMeanSquareNorm(module, dtype, None if heads else kernels)

        join: Callable[..., Projection] = (
            PackedLinear.shared if packed else partial(JoinedLinear, kernels=kernels)
        )
        self.index = index
        self._attention = attention
        self._attention_in, self._mlp_in = norm(parts.attention_in), norm(parts.mlp_in)
        self._attention_out = None if parts.attention_out is None else norm(parts.attention_out)
        self._mlp_out = None if parts.mlp_out is None else norm(parts.mlp_out)
        self._head_norms = (
            ()
            if parts.query is None or parts.key is None
            else (norm(parts.query, True), norm(parts.key, True))
        )
        self._projections: list[Projection] = [
            join(*parts.qkv),
            join(parts.o),
            join(*parts.gate_up),
            join(parts.down),
        ]
        self._widths = [layer.out_features for layer in parts.qkv]
        self._activation = parts.activation
        self._kernels = kernels
        self._native_gate = kernels is not None and isinstance(parts.activation, nn.SiLU | SiLUActivation)
        self._rule = AttentionRule.of(attention)
        self._packed = packed
        self._native = self._describe()

    def in_one_call(self) -> NativeLayer | None:
        """Returns what the kernel of a whole layer reads, or None if it does not serve one of the parts."""
        # weights that are not copied may have moved
        return self._native if self._packed else self._describe()

    def _describe(self) -> NativeLayer | None:
        if not isinstance(self._kernels, Kernels) or not self._native_gate or self._rule is None:
            return None
        if self._attention_out is not None or self._mlp_out is not None:
            return None
        operands = [projection.operands() for projection in self._projections]
        served = [part for part in operands if part is not None]
        if len(served) < len(operands):
            return None
        return NativeLayer(served, (self._attention_in, self._mlp_in), self._head_norms, self._rule)

    def refresh(self) -> None:
        """Reads the trainer's weights again."""
        norms = (self._attention_in, self._attention_out, self._mlp_in, self._mlp_out, *self._head_norms)
        for part in (*self._projections, *(n for n in norms if n is not None)):
            part.refresh()
        self._native = self._describe()

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs the layer on what a transformers model passes to its layers, whatever the names are.

        Args:
            *args: Positional arguments. Together with ``kwargs`` they contain hidden states [B, Q, hidden],
                the pair (cos, sin), a `SlotCache` and a `ForwardBatch`.
            **kwargs: Keyword arguments.

        Returns:
            Hidden states [B, Q, hidden].

        Raises:
            TypeError: One of the four is missing.
        """
        hidden_states, rotary = hidden_states_in(args, kwargs), rotary_in(args, kwargs)
        cache, batch = first_instance(Cache, args, kwargs), first_instance(ForwardBatch, args, kwargs)
        if rotary is None:
            raise TypeError("the model passes no rotary embedding (cos, sin) to a fused layer")
        native = None if batch.ragged is None else self.in_one_call()
        if native is not None:
            kernels: Any = self._kernels
            lines = kernels.cached(cache, self.index)
            return kernels.decoder_layer(native, hidden_states, rotary, batch.ragged, lines)
        return self._in_parts(hidden_states, rotary, cache, batch)

    def _in_parts(
        self,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        cache: Any,
        batch: ForwardBatch,
    ) -> torch.Tensor:
        """Runs the layer's products and kernels one after the other."""
        _, o, gate_up, down = self._projections
        attended = self._attend(self._attention_in(hidden_states), rotary, cache, batch)
        if self._attention_out is None:
            hidden_states, normed = self._mlp_in.after(o, attended, hidden_states)
        else:
            hidden_states = hidden_states + self._attention_out(o(attended))
            normed = self._mlp_in(hidden_states)
        if self._kernels is not None and self._native_gate:
            gated = project_gate(gate_up, normed, self._kernels)
        else:
            gate, up = gate_up(normed).chunk(2, dim=-1)
            gated = self._activation(gate).mul_(up)
        if self._mlp_out is None:
            return down(gated, hidden_states)
        return hidden_states + self._mlp_out(down(gated))

    def _attend(
        self, normed: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], cache: Any, batch: ForwardBatch
    ) -> torch.Tensor:
        """Stores keys and values; returns the attention output [B, Q, H · d]."""
        qkv, kernels = self._projections[0], cast(Any, self._kernels)
        if batch.ragged is not None and self.takes_ragged:
            lines = kernels.cached(cache, self.index)
            gains = (self._head_norms[0].gain, self._head_norms[1].gain) if self._head_norms else None
            eps = self._head_norms[0].eps if self._head_norms else 0.0
            projected = project(qkv, normed, kernels)
            heads = kernels.rotate_and_store(projected, rotary, gains, eps, batch.ragged, lines)
            return kernels.attend(heads, lines, batch.ragged, self._rule)
        query, key, value = self._rotated_heads(qkv(normed), batch.rotation(*rotary))
        key, value = cache.update(key, value, self.index)
        out, _ = slot_attention(self, query, key, value, None, forward_batch=batch, **self._attention)
        return out.flatten(2)

    @property
    def kernels(self) -> AnyKernels | None:
        """The native kernels that the layer runs on, or None."""
        return self._kernels

    @property
    def takes_ragged(self) -> bool:
        """Whether a forward may hold tokens without padding."""
        return self._kernels is not None and self._rule is not None

    def _rotated_heads(
        self, joined: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Splits joined projections into heads, normalizes them where the layer has norms, and rotates them.

        Returns:
            Query [B, H, Q, d], key and value [B, KV, Q, d].
        """
        cos, sin = rotation
        dim = cos.shape[-1]
        heads = joined.unflatten(-1, (-1, dim))
        queries, keys = self._widths[0] // dim, self._widths[1] // dim
        both = heads[:, :, : queries + keys]
        if self._head_norms:
            query_norm, key_norm = self._head_norms
            both = torch.cat([query_norm(both[:, :, :queries]), key_norm(both[:, :, queries:])], dim=2)
        both = torch.addcmul(both * cos, both.roll(dim // 2, dims=-1), sin)
        split = both[:, :, :queries], both[:, :, queries:], heads[:, :, queries + keys :]
        return split[0].transpose(1, 2), split[1].transpose(1, 2), split[2].transpose(1, 2)
