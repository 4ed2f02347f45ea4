"""A decoder layer that is trained on native kernels: the engine's, and their gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paceline.rl.learner.fused.trained_linear import TrainedLinear
from paceline.rollout.model.fused_layer import LayerParts, RootMeanSquareNorm
from paceline.rollout.native import AttentionRule, Kernels, RaggedTokens
from paceline.rollout.native.gradients import GradientKernels, HeadsInput, Pieces
from paceline.rollout.native.products import PackedProducts


@dataclass(frozen=True, slots=True)
class PackedTokens:
    """The T tokens of a micro-batch, as the attention of every layer needs them.

    Attributes:
        ragged: Their places in a cache with a slot for each sample, for the forward pass.
        pieces: Prompts and samples, for the backward pass.
        rotary: cos and sin, bfloat16 [1, T, d] each.
        cache: Working memory for one layer's keys and values, bfloat16 [2, samples, KV, span, d].
        prompts: The slot that a prompt is computed in, the other slots that need it, and its length.
    """

    ragged: RaggedTokens
    pieces: Pieces
    rotary: tuple[torch.Tensor, torch.Tensor]
    cache: torch.Tensor
    prompts: list[tuple[int, slice, int]]


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """What a layer's backward pass needs of its forward pass; bfloat16.

    Attributes:
        x: Input of the layer, [T, hidden].
        joined: Queries, keys and values before rotation, [T, (H + 2 KV) · d].
        attended: Output of the attention, [T, H · d].
        middle: Residual stream after the attention, [T, hidden].
        gate_up: Gate and up projections, [T, 2 · intermediate].
    """

    x: torch.Tensor
    joined: torch.Tensor
    attended: torch.Tensor
    middle: torch.Tensor
    gate_up: torch.Tensor


class TrainedLayer:
    """Computes a decoder layer as `FusedLayer` does, bit for bit, and its gradients.

    Args:
        parts: Parts of the trainer's layer, without norms after attention and MLP, its gate a SiLU.
        rule: How its attention scores become weights.
        kernels: The engine's kernels for bfloat16.
        gradients: Kernels of the backward pass.
        products: Products with packed weights, which serve the layer's shapes.

    Attributes:
        kv_width: Width of a token's keys, over all heads.
    """

    def __init__(
        self,
        parts: LayerParts,
        rule: AttentionRule,
        kernels: Kernels,
        gradients: GradientKernels,
        products: PackedProducts,
    ) -> None:
        def norm(module: nn.Module) -> RootMeanSquareNorm:
            return RootMeanSquareNorm(module, torch.bfloat16, kernels)

        def linear(*layers: nn.Linear) -> TrainedLinear:
            return TrainedLinear(gradients, products, *layers)

        self._kernels, self._gradients, self._rule = kernels, gradients, rule
        self._qkv, self._o = linear(*parts.qkv), linear(parts.o)
        self._gate_up, self._down = linear(*parts.gate_up), linear(parts.down)
        self._norms = [norm(parts.attention_in), norm(parts.mlp_in)]
        self._head_norms = [norm(n) for n in (parts.query, parts.key) if n is not None]
        self._modules: list[Any] = [
            n for n in (parts.attention_in, parts.mlp_in, parts.query, parts.key) if n is not None
        ]
        self.kv_width = parts.qkv[1].out_features

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The layer's parameters, in the order of the gradients from `backward`."""
        linears = (self._qkv, self._o, self._gate_up, self._down)
        return [*(m.weight for m in self._modules), *(p for linear in linears for p in linear.parameters)]

    def refresh(self) -> None:
        """Reads the current weights."""
        for linear in (self._qkv, self._o, self._gate_up, self._down):
            linear.refresh()
        for norm in (*self._norms, *self._head_norms):
            norm.refresh()

    def forward(self, x: torch.Tensor, tokens: PackedTokens) -> tuple[torch.Tensor, LayerInputs]:
        """Runs the layer on ``x``, bfloat16 [T, hidden]; returns its output and what `backward` needs."""
        joined = self._qkv(self._norms[0](x))
        attended = self._attend(joined, tokens)
        middle = self._o(attended, x)
        gate_up = self._gate_up(self._norms[1](middle))
        out = self._down(self._kernels.silu_gate(gate_up), middle)
        return out, LayerInputs(x, joined, attended, middle, gate_up)

    def backward(
        self, saved: LayerInputs, tokens: PackedTokens, grad: torch.Tensor, rounded: torch.Tensor
    ) -> tuple[torch.Tensor, list[torch.Tensor | None]]:
        """Turns the gradient of the layer's output into that of its input, in place.

        Args:
            saved: What `forward` returned.
            tokens: The tokens that it ran on.
            grad: Gradient of the output, float32 [T, hidden]; it becomes that of the input.
            rounded: ``grad`` in bfloat16.

        Returns:
            The new ``grad`` in bfloat16, and the gradients of `parameters`, see
            `TrainedLinear.parameter_gradients`.
        """
        kernels, (attention_in, mlp_in) = self._gradients, self._norms
        of_down = self._down.parameter_gradients(rounded, self._kernels.silu_gate(saved.gate_up))
        of_gate_up = kernels.gate_backward(saved.gate_up, self._down.input_gradient(rounded))
        of_projections = self._gate_up.parameter_gradients(of_gate_up, mlp_in(saved.middle))
        of_normed = self._gate_up.input_gradient(of_gate_up)
        rounded, of_mlp_in = kernels.norm_backward(saved.middle, mlp_in.gain, mlp_in.eps, of_normed, grad)
        of_o = self._o.parameter_gradients(rounded, saved.attended)
        heads = self._heads(saved, tokens)
        of_joined, of_gains = kernels.attention_backward(
            heads, tokens.pieces, self._rule, self._o.input_gradient(rounded)
        )
        of_qkv = self._qkv.parameter_gradients(of_joined, attention_in(saved.x))
        of_normed = self._qkv.input_gradient(of_joined)
        rounded, of_attention_in = kernels.norm_backward(
            saved.x, attention_in.gain, attention_in.eps, of_normed, grad
        )
        head_gains = list(of_gains) if self._head_norms else []
        linears = (*of_qkv, *of_o, *of_projections, *of_down)
        return rounded, [of_attention_in, of_mlp_in, *head_gains, *linears]

    def _gains_of_heads(self) -> tuple[tuple[torch.Tensor, torch.Tensor] | None, float]:
        """Returns the gains of the query and key norms with their epsilon; None and 0 if there are none."""
        if not self._head_norms:
            return None, 0.0
        query, key = self._head_norms
        return (query.gain, key.gain), query.eps

    def _heads(self, saved: LayerInputs, tokens: PackedTokens) -> HeadsInput:
        cos, sin = tokens.rotary
        heads = saved.attended.shape[-1] // cos.shape[-1]
        return HeadsInput(saved.joined, (cos[0], sin[0]), *self._gains_of_heads(), heads)

    def _attend(self, joined: torch.Tensor, tokens: PackedTokens) -> torch.Tensor:
        """Returns the attention's output [T, H · d]."""
        queries = self._kernels.rotate_and_store(
            joined[None], tokens.rotary, *self._gains_of_heads(), tokens.ragged, tokens.cache
        )
        for slot, others, length in tokens.prompts:
            tokens.cache[:, others, :, :length] = tokens.cache[:, slot : slot + 1, :, :length]
        return self._kernels.attend(queries, tokens.cache, tokens.ragged, self._rule)[0]
