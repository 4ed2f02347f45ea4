"""A decoder layer with joined projections and few operators, for every model whose layer has the usual parts.

A transformers decoder layer of a Llama-like model runs about 160 operators for a token; at small batches on a
CPU their dispatch, not their arithmetic, is half of the time. `FusedLayer` runs the same mathematics in four
matrix products and five kernels (`paceline.rollout.native`), or in about 60 operators where those cannot be
built. It is not written for a model: it is put together from the parts that a layer *has* (`LayerParts`), and
    used only if, with random weights, it gives what the
original layer gives (`paceline.rollout.model.fusion_check`). A layer with other parts, or other mathematics,
stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers.activations import SiLUActivation

from paceline.rollout.model.attention import ForwardBatch, slot_attention
from paceline.rollout.model.packed_linear import JoinedLinear, PackedLinear, Projection, joinable
from paceline.rollout.native import AttentionRule, Kernels
from paceline.rollout.transformers_api import Cache, hidden_states_in, of_type, rotary_in

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
    """The parts of one decoder layer.

    Attributes:
        attention_in: Norm before the attention.
        attention_out: Norm after it, where there is one (Gemma).
        mlp_in, mlp_out: The same around the feed-forward part.
        query, key: Norms of each head, where there are any (Qwen3, Gemma 3).
        qkv, o, gate_up, down: Linear layers; those of one input together.
        activation: Of the gate.
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
        """The parts of a layer that has exactly these, under the names that transformers gives them; else
        None.
        """
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
        fits = joinable(qkv) and joinable(gate_up) and joinable([parts.o]) and joinable([parts.down])
        return parts if fits and (parts.query is None) == (parts.key is None) else None


def _children(module: nn.Module) -> set[str]:
    return {name for name, _ in module.named_children()}


class RootMeanSquareNorm:
    """x · rsqrt(mean(x²) + ε) · gain (Zhang and Sennrich, arXiv 1910.07467, equation 4), with ε as every
    Llama-like model adds it.

    Args:
        norm: A module of that mathematics, whose gain is its ``weight`` (Llama) or 1 + ``weight`` (Gemma):
            which, it is asked.
        dtype: What to compute in.
        kernels: Native kernels, or None for torch's operator.

    Raises:
        ValueError: for a module of other mathematics.
    """

    def __init__(self, norm: nn.Module, dtype: torch.dtype, kernels: Kernels | None) -> None:
        eps = getattr(norm, "variance_epsilon", getattr(norm, "eps", None))
        weight = getattr(norm, "weight", None)
        if not isinstance(eps, float) or not isinstance(weight, torch.Tensor):
            raise ValueError(f"{type(norm).__name__} has no epsilon or no weight")
        self.eps = eps
        self._weight, self._dtype, self._kernels = weight, dtype, kernels
        self._shape = tuple(weight.shape)
        self._offset = self._ask(norm)
        self._shared = self._offset == 0 and weight.dtype == dtype
        self.gain = torch.empty_like(weight, dtype=dtype).detach()
        self.refresh()

    def _ask(self, norm: nn.Module) -> float:
        weight = self._weight
        x = torch.ones(1, *self._shape, device=weight.device, dtype=weight.dtype)
        gain = norm(x)[0].float() * (1 + self.eps) ** 0.5
        for offset in (0.0, 1.0):
            if torch.allclose(gain, weight.float() + offset, rtol=0.02, atol=1e-3):
                return offset
        raise ValueError(f"{type(norm).__name__} is no root-mean-square norm")

    @torch.no_grad()
    def refresh(self) -> None:
        """Reads the gain again, in place: a captured graph knows its address. A shared one is asked where it
        lies now: wrapping a module for training may move its parameters.
        """
        if self._shared:
            self.gain = self._weight.detach()
        else:
            self.gain.copy_(self._weight.float() + self._offset)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: [..., width]."""
        if self._kernels is not None:
            return self._kernels.rms_norm(x, self.gain, self.eps)
        return nn.functional.rms_norm(x, self._shape, self.gain, self.eps)


class FusedLayer(nn.Module):
    """One decoder layer; takes what transformers' decoder models hand to theirs.

    Args:
        parts: Of the trainer's layer.
        index: Of the layer, for the cache.
        attention: Keyword arguments that the original layer hands to its attention function (scaling, sliding
            window, …).
        dtype: What to compute in.
        packed: Whether the linear layers are packed copies.
        kernels: Native kernels that serve this layer's widths, or None for torch's operators.
    """

    def __init__(
        self,
        parts: LayerParts,
        index: int,
        attention: dict[str, Any],
        dtype: torch.dtype,
        packed: bool,
        kernels: Kernels | None,
    ) -> None:
        super().__init__()

        def norm(module: nn.Module, heads: bool = False) -> RootMeanSquareNorm:
            return RootMeanSquareNorm(module, dtype, None if heads else kernels)

        join: type[PackedLinear] | type[JoinedLinear] = PackedLinear if packed else JoinedLinear
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
        self._rule = attention_rule(attention)

    def refresh(self) -> None:
        """Reads the trainer's weights again."""
        norms = (self._attention_in, self._attention_out, self._mlp_in, self._mlp_out, *self._head_norms)
        for part in (*self._projections, *(n for n in norms if n is not None)):
            part.refresh()

    def forward(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Runs the layer on what a transformers model hands to its layers, whatever the names are.

        Args:
            args, kwargs: Hidden states [B, Q, hidden], the pair (cos, sin), a `SlotCache` and a
                `ForwardBatch` among them.

        Returns:
            Hidden states [B, Q, hidden].

        Raises:
            TypeError: when one of the four is missing.
        """
        hidden_states, rotary = hidden_states_in(args, kwargs), rotary_in(args, kwargs)
        cache, batch = of_type(Cache, args, kwargs), of_type(ForwardBatch, args, kwargs)
        if rotary is None:
            raise TypeError("a fused layer got no rotary embedding")
        qkv, o, gate_up, down = self._projections
        attended = self._attend(qkv(self._attention_in(hidden_states)), rotary, cache, batch)
        if self._attention_out is None:
            hidden_states = o(attended, hidden_states)
        else:
            hidden_states = hidden_states + self._attention_out(o(attended))
        gated = self._gate(gate_up(self._mlp_in(hidden_states)))
        if self._mlp_out is None:
            return down(gated, hidden_states)
        return hidden_states + self._mlp_out(down(gated))

    def _gate(self, joined: torch.Tensor) -> torch.Tensor:
        if self._native_gate:
            assert self._kernels is not None
            return self._kernels.silu_gate(joined)
        gate, up = joined.chunk(2, dim=-1)
        return self._activation(gate).mul_(up)

    def _attend(
        self, joined: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], cache: Any, batch: ForwardBatch
    ) -> torch.Tensor:
        """Stores keys and values; returns [B, Q, H · d]."""
        if batch.ragged is not None and self._kernels is not None and self._rule is not None:
            lines = cache.lines(self.index)
            gains = (self._head_norms[0].gain, self._head_norms[1].gain) if self._head_norms else None
            eps = self._head_norms[0].eps if self._head_norms else 0.0
            heads = self._kernels.rotate_and_store(joined, rotary, gains, eps, batch.ragged, lines)
            return self._kernels.attend(heads, lines, batch.ragged, self._rule)
        query, key, value = self._rotated_heads(joined, batch.rotation(*rotary))
        key, value = cache.update(key, value, self.index)
        out, _ = slot_attention(self, query, key, value, None, forward_batch=batch, **self._attention)
        return out.flatten(2)

    @property
    def takes_ragged(self) -> bool:
        """Whether a forward may hold tokens without padding."""
        return self._kernels is not None and self._rule is not None

    def _rotated_heads(
        self, joined: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query [B, H, Q, d], key and value [B, KV, Q, d], normed where there are norms, rotated by
        position.
        """
        cos, sin = rotation
        dim = cos.shape[-1]
        heads = joined.unflatten(-1, (-1, dim))
        queries, keys = self._widths[0] // dim, self._widths[1] // dim
        both = heads[:, :, : queries + keys]
        if self._head_norms:
            of_query, of_key = self._head_norms
            both = torch.cat([of_query(both[:, :, :queries]), of_key(both[:, :, queries:])], dim=2)
        both = torch.addcmul(both * cos, both.roll(dim // 2, dims=-1), sin)
        split = both[:, :, :queries], both[:, :, queries:], heads[:, :, queries + keys :]
        return split[0].transpose(1, 2), split[1].transpose(1, 2), split[2].transpose(1, 2)


def attention_rule(arguments: dict[str, Any]) -> AttentionRule | None:
    """The native kernel's rule for the keyword arguments of an attention function; None where it has none."""
    known = {"scaling", "sliding_window", "softcap"}
    if "scaling" not in arguments or not known >= {
        name for name, value in arguments.items() if value is not None
    }:
        return None
    return AttentionRule(
        arguments["scaling"], arguments.get("softcap") or 0.0, arguments.get("sliding_window") or 0
    )
