"""Embeddings and decoder layers, differentiated so that the residual stream's gradient stays in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from paceline.rl.learner.fused.trained_layer import LayerInputs, PackedTokens, TrainedLayer
from paceline.rl.learner.fused.trained_linear import gradient_of


def embed(ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """Returns the embeddings of tokens, float32 [T, hidden], differentiably.

    Args:
        ids: Token ids, int64 [T].
        weight: Embeddings of the vocabulary, float32 [V, hidden].
    """
    return _Embedding.apply(ids, weight)


class _Embedding(torch.autograd.Function):
    """A lookup whose gradient is added to the rows that were read, not to the whole vocabulary."""

    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Looks the tokens up."""
        ctx.ids, ctx.weight = ids, weight
        return weight.detach()[ids]

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[None, torch.Tensor | None]:
        """Adds each token's gradient to its row."""
        total, returned = gradient_of(ctx.weight)
        total.index_add_(0, ctx.ids, grad)
        return None, returned


def run_layers(
    layers: Sequence[TrainedLayer], x: torch.Tensor, tokens: PackedTokens, recompute: bool
) -> torch.Tensor:
    """Runs decoder layers, differentiably.

    Args:
        layers: The layers.
        x: Token embeddings, float32 [T, hidden].
        tokens: Description of the tokens.
        recompute: Whether a layer keeps its input only and runs again in the backward pass.

    Returns:
        Hidden states after the last layer, bfloat16 [T, hidden].
    """
    return _LayerStack.apply(x, layers, tokens, recompute, *(p for layer in layers for p in layer.parameters))


class _LayerStack(torch.autograd.Function):
    """Layers as one operation of autograd; parameters are arguments so that their gradients are returned."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        layers: Sequence[TrainedLayer],
        tokens: PackedTokens,
        recompute: bool,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        """Runs the layers, keeping what the backward pass needs if there will be one."""
        hidden = x.to(torch.bfloat16)
        kept: list[torch.Tensor | LayerInputs] = []
        for layer in layers:
            before = hidden
            hidden, saved = layer.forward(hidden, tokens)
            if any(ctx.needs_input_grad):
                kept.append(before if recompute else saved)
        ctx.layers, ctx.tokens, ctx.kept = layers, tokens, kept
        return hidden

    @staticmethod
    def backward(ctx: Any, of_output: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """Runs the layers' backward passes, from the last to the first."""
        rounded, grad = of_output.contiguous(), of_output.float()
        gradients: list[list[torch.Tensor | None]] = []
        for layer in reversed(ctx.layers):
            saved = ctx.kept.pop()
            if isinstance(saved, torch.Tensor):
                _, saved = layer.forward(saved, ctx.tokens)
            rounded, of_parameters = layer.backward(saved, ctx.tokens, grad, rounded)
            gradients.append(of_parameters)
        return grad, None, None, None, *(g for of_layer in reversed(gradients) for g in of_layer)
