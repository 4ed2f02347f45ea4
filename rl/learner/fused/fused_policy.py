"""A policy whose update runs on the engine's own kernels, so that its log-probs are those of rollouts."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.activations import SiLUActivation

from paceline.rl.errors import one_line
from paceline.rl.learner.fused.changes import ParameterChanges
from paceline.rl.learner.fused.head_scores import score_targets
from paceline.rl.learner.fused.layer_stack import embed, run_layers
from paceline.rl.learner.fused.trained_layer import PackedTokens, TrainedLayer
from paceline.rl.learner.fused.trained_linear import TrainedLinear, can_train
from paceline.rl.learner.packing import PackedBatch
from paceline.rl.learner.packing_check import decoder_of
from paceline.rollout.model.fused_layer import LayerParts
from paceline.rollout.model.fusion_check import LayerCall, decoder_layers, observe_calls, which_fuse
from paceline.rollout.model.inference_view import copy_sharing
from paceline.rollout.native import AttentionRule, Kernels, RaggedTokens, load_cpu_kernels
from paceline.rollout.native.gradients import GradientKernels, Pieces, load_gradient_kernels
from paceline.rollout.native.products import PackedProducts, load_products
from paceline.rollout.text_limits import fix_rotary
from paceline.rollout.transformers_api import hidden_states_in

_DECODER_PARTS = {"embed_tokens", "layers", "norm", "rotary_emb"}


class FusedPolicy:
    """Computes log-probs of packed sequences in bfloat16, forward and backward, on native CPU kernels.

    The forward pass is the engine's, operation by operation, so that its log-probs equal those of rollouts
    bit for bit. Weights stay in float32 where the trainer has them; packed copies are renewed when they have
    changed.

    Args:
        policy: A causal LM on the CPU, of embeddings, Llama-like layers, a norm and an output head.

    Raises:
        UnsupportedPolicy: It has other parts.
    """

    def __init__(self, policy: PreTrainedModel) -> None:
        try:
            self._build(policy)
        except (
            TypeError,
            ValueError,
            AttributeError,
            RuntimeError,
        ) as error:  # a model of an unforeseen form
            raise UnsupportedPolicy(f"its layers cannot be compared ({one_line(error)})") from None

    def _build(self, policy: PreTrainedModel) -> None:
        self._kernels, self._gradients, products = _native()
        decoder: Any = decoder_of(policy)
        if any(p.dtype != torch.float32 for p in policy.parameters()):
            raise UnsupportedPolicy("its parameters are not float32")
        if {name for name, _ in decoder.named_children()} != _DECODER_PARTS:
            raise UnsupportedPolicy(f"{type(decoder).__name__} has other parts than layers and one norm")
        self._decoder = decoder
        view = copy_sharing(policy)
        fix_rotary(view)
        viewed: Any = decoder_of(view)
        self._rotary = viewed.rotary_emb
        calls = _observed(policy, view)
        layers = decoder_layers(policy)
        self._layers = [self._layer(layer, call, products) for layer, call in zip(layers, calls, strict=True)]
        head = policy.get_output_embeddings()
        if type(head) is not nn.Linear or not can_train(products, head):
            raise UnsupportedPolicy("its output head's width is no multiple of 32")
        self._head = TrainedLinear(self._gradients, products, head)
        self._changes = ParameterChanges(policy)
        self._dim = calls[0].rotary[0].shape[-1]
        self._kv_heads = self._layers[0].kv_width // self._dim

    def _layer(self, layer: nn.Module, call: LayerCall, products: PackedProducts) -> TrainedLayer:
        parts, rule = LayerParts.of(layer), AttentionRule.of(call.attention)
        if parts is None or rule is None:
            raise UnsupportedPolicy(f"{type(layer).__name__} is no Llama-like layer")
        joined = parts.qkv, (parts.o,), parts.gate_up, (parts.down,)
        served = all(can_train(products, *linears) for linears in joined) and self._kernels.serve(
            call.rotary[0].shape[-1], parts.down.out_features, parts.down.in_features
        )
        gated = isinstance(parts.activation, nn.SiLU | SiLUActivation)
        if not served or not gated or parts.attention_out is not None or parts.mlp_out is not None:
            raise UnsupportedPolicy(f"{type(layer).__name__} has widths, norms or a gate without kernels")
        return TrainedLayer(parts, rule, self._kernels, self._gradients, products)

    def hidden_states(self, batch: PackedBatch) -> torch.Tensor:
        """Returns the hidden states after the final norm, bfloat16 [T, hidden], differentiably."""
        if self._changes.since_last_call():
            for layer in self._layers:
                layer.refresh()
            self._head.refresh()
        tokens = self._packed_tokens(batch)
        embedded = embed(batch.tokens, self._decoder.embed_tokens.weight)
        recompute = torch.is_grad_enabled() and bool(getattr(self._decoder, "gradient_checkpointing", False))
        hidden = run_layers(self._layers, embedded, tokens, recompute)
        norm = self._decoder.norm
        gain = {"weight": norm.weight.to(torch.bfloat16)}
        with torch.autocast("cpu", enabled=False):
            return torch.func.functional_call(norm, gain, (hidden,))

    def scores(self, batch: PackedBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the log-prob of each target under softmax(logits / temperature), and the entropy there.

        Both are float32 [M], in nats, and differentiable.
        """
        hidden = self.hidden_states(batch)[batch.predict]
        return score_targets(self._head, self._gradients, hidden, batch.targets, temperature)

    def _packed_tokens(self, batch: PackedBatch) -> PackedTokens:
        """Describes a micro-batch. Each sample has a slot; a prompt's keys are copied to all its samples."""
        slots: list[int] = []
        starts: list[int] = []
        counts: list[int] = []
        prompts: list[tuple[int, slice, int]] = []
        for prompt, *samples in batch.lengths:
            first = len(slots)
            slots += range(first, first + len(samples))
            starts += [0, *[prompt] * (len(samples) - 1)]
            counts += [prompt + samples[0], *samples[1:]]
            if len(samples) > 1:
                prompts.append((first, slice(first + 1, first + len(samples)), prompt))
        span = max(start + count for start, count in zip(starts, counts, strict=True))
        with torch.autocast("cpu", enabled=False), torch.no_grad():
            cos, sin = self._rotary(torch.empty(0, dtype=torch.bfloat16), batch.positions[None])
        shape = 2, len(slots), self._kv_heads, span, self._dim
        return PackedTokens(
            ragged=RaggedTokens(slots, starts, counts),
            pieces=Pieces(batch.lengths),
            rotary=(cos.contiguous(), sin.contiguous()),
            cache=torch.empty(shape, dtype=torch.bfloat16),
            prompts=prompts,
        )


class UnsupportedPolicy(Exception):
    """A policy's update does not run on the engine's kernels; the message is the reason, as a clause."""


def _native() -> tuple[Kernels, GradientKernels, PackedProducts]:
    kernels, gradients = load_cpu_kernels("cpu", torch.bfloat16), load_gradient_kernels()
    products = load_products()
    if kernels is None or gradients is None or products is None:
        raise UnsupportedPolicy("the native kernels could not be built: install g++")
    return kernels, gradients, products


@torch.no_grad()
def _observed(policy: PreTrainedModel, view: PreTrainedModel) -> list[LayerCall]:
    """Returns the call of each layer, after checking that nothing else happens to the hidden states.

    Args:
        policy: The policy.
        view: A copy of it that shares its weights; its attention is changed.

    Raises:
        UnsupportedPolicy: Layers get different rotary embeddings or compute something else, embeddings are
            scaled, or hidden states change outside of layers and norm.
    """
    layers = decoder_layers(view)
    decoder: Any = decoder_of(view)
    after: list[torch.Tensor] = []
    hooks = [
        layers[-1].register_forward_hook(lambda module, args, output: after.append(output)),
        decoder.norm.register_forward_hook(lambda module, args, output: after.append(output)),
        decoder.register_forward_hook(lambda module, args, output: after.append(output.last_hidden_state)),
    ]
    calls = observe_calls(view, layers, torch.float32)
    for hook in hooks:
        hook.remove()
    if calls is None or len(after) != 3:
        raise UnsupportedPolicy("its layers get no rotary embedding")
    first = hidden_states_in(calls[0].observed.args, calls[0].observed.kwargs)
    embedded = decoder.embed_tokens.weight[torch.zeros(first.shape[1], dtype=torch.long)]
    last = after[0] if isinstance(after[0], torch.Tensor) else after[0][0]
    if not torch.equal(first[0], embedded) or not torch.equal(decoder.norm(last), after[2]):
        raise UnsupportedPolicy("its hidden states are scaled outside of its layers")
    if any(not torch.equal(call.rotary[0], calls[0].rotary[0]) for call in calls):
        raise UnsupportedPolicy("its layers have different rotary embeddings")
    if not all(which_fuse(layers, calls)):
        raise UnsupportedPolicy("some of its layers compute something else than Llama's")
    return calls
