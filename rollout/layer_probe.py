"""Which decoder layers `FusedLayer` can stand in for: seen from one forward, then proved on random weights."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache, PreTrainedModel

from rollout.attention import SLOT_ATTENTION, ForwardBatch, chain_seats, slot_attention
from rollout.fused_layer import FusedLayer, LayerParts
from rollout.kv_cache import CacheShape, SlotCache
from rollout.native import Kernels, RaggedTokens, load_kernels

_PROBE_ATTENTION = "paceline_probe"
_RULES = ("scaling", "sliding_window", "softcap", "s_aux")
_TOKENS = 5
_TOLERANCE = 1e-4


@dataclass(slots=True)
class LayerCall:
    """What a model hands to one of its layers, and that layer to its attention function.

    Attributes:
        rotary: cos and sin [1, Q, d].
        attention: Keyword arguments of the attention function.
    """

    rotary: tuple[torch.Tensor, torch.Tensor]
    attention: dict[str, Any]


def _probe_attention(module: nn.Module, *args: Any, seen_attention: dict[int, dict[str, Any]], **kwargs: Any) -> Any:
    seen_attention[id(module)] = {name: value for name, value in kwargs.items() if name in _RULES and value is not None}
    return slot_attention(module, *args, **kwargs)


AttentionInterface.register(_PROBE_ATTENTION, _probe_attention)


@torch.no_grad()
def observe_calls(view: PreTrainedModel, layers: nn.ModuleList, dtype: torch.dtype) -> list[LayerCall] | None:
    """Runs a few tokens through the model and notes what each layer is called with; None where a layer gets no rotary embedding.

    Args:
        view: A model of the engine's own, whose attention implementation may be set.
        layers: Its decoder layers.
        dtype: What to compute in; parameters of other dtypes are cast on the way.
    """
    device = next(view.parameters()).device
    rotary: dict[int, Any] = {}
    attention: dict[int, dict[str, Any]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        rotary[id(module)] = kwargs.get("position_embeddings")

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    view.set_attn_implementation(_PROBE_ATTENTION)
    positions = torch.arange(_TOKENS, device=device)[None]
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            view(
                input_ids=torch.zeros_like(positions),
                position_ids=positions,
                past_key_values=DynamicCache(),
                use_cache=True,
                logits_to_keep=1,
                forward_batch=ForwardBatch(slice(0, 1), chain_seats(positions), span=_TOKENS, from_start=True),
                seen_attention=attention,
            )
    finally:
        view.set_attn_implementation(SLOT_ATTENTION)
        for hook in hooks:
            hook.remove()
    if any(rotary.get(id(layer)) is None or id(getattr(layer, "self_attn", None)) not in attention for layer in layers):
        return None
    return [LayerCall(rotary[id(layer)], attention[id(layer.self_attn)]) for layer in layers]


@torch.no_grad()
def can_fuse(layer: nn.Module, call: LayerCall) -> bool:
    """Whether a `FusedLayer` made of the layer's parts computes what the layer computes.

    Asked in float32 on a copy with random weights, so that a part whose present weights hide it (a zero bias, a gain of one)
    is asked too; and in two forwards, so that the second reads what the first has stored.
    """
    original: Any = copy.deepcopy(layer).float().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in original.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * (parameter.shape[-1] ** -0.5) + 0.1)
    parts = LayerParts.of(original)
    if parts is None:
        return False
    original.self_attn.layer_idx = 0
    hidden = torch.randn(1, _TOKENS, parts.down.out_features, generator=generator).to(call.rotary[0].device)
    try:
        fused = FusedLayer(parts, 0, call.attention, torch.float32, packed=False, kernels=kernels_for(parts, call, torch.float32))
        wanted = _in_two_forwards(original, parts, call, hidden, ragged=False)
        got = _in_two_forwards(fused, parts, call, hidden, ragged=fused.takes_ragged)
    except (RuntimeError, TypeError, ValueError, AttributeError):
        return False
    return got.shape == wanted.shape and bool((got - wanted).norm() <= _TOLERANCE * wanted.norm())


def _in_two_forwards(layer: nn.Module, parts: LayerParts, call: LayerCall, hidden: torch.Tensor, ragged: bool) -> torch.Tensor:
    """[1, Q, hidden] of the layer over a cache of its own: all tokens but two, then those."""
    dim = call.rotary[0].shape[-1]
    device = hidden.device
    cache = SlotCache(CacheShape(1, parts.qkv[1].out_features // dim, dim, 1, _TOKENS, 0, torch.float32), device)
    positions = torch.arange(_TOKENS, device=device)[None]
    outputs = []
    for part in (slice(0, _TOKENS - 2), slice(_TOKENS - 2, _TOKENS)):
        start, count = part.start, part.stop - part.start
        tokens = RaggedTokens([0], [start], [count]) if ragged else None
        batch = ForwardBatch(slice(0, 1), chain_seats(positions[:, part]), span=_TOKENS, ragged=tokens)
        cache.begin(batch)
        cos, sin = (x.float()[:, part].contiguous() for x in call.rotary)
        out = layer(
            hidden[:, part].contiguous(),
            position_ids=batch.positions,
            position_embeddings=(cos, sin),
            past_key_values=cache,
            forward_batch=batch,
        )
        outputs.append(out[0] if isinstance(out, tuple) else out)
    return torch.cat(outputs, dim=1)


def kernels_for(parts: LayerParts, call: LayerCall, dtype: torch.dtype) -> Kernels | None:
    """Native kernels that serve a layer's widths, or None."""
    widths = parts.down.out_features, parts.down.in_features
    served = Kernels.serve(call.rotary[0].shape[-1], *widths)
    return load_kernels(parts.down.weight.device.type, dtype) if served else None


def fuse_layers(view: PreTrainedModel, source: PreTrainedModel, dtype: torch.dtype, packed: bool) -> list[FusedLayer]:
    """Puts a `FusedLayer` in the place of each of the view's decoder layers that allow it.

    Args:
        view: The engine's own copy of the model; changed in place.
        source: The trainer's model, whose weights packed layers are made of.
        dtype: What to compute in.
        packed: Whether linear layers are packed; otherwise the fused layers read the view's own weights.

    Returns:
        Those put in place; none for a model without a list of decoder layers.
    """
    try:
        layers, sources = decoder_layers(view), decoder_layers(source)
    except ValueError:
        return []
    calls = observe_calls(view, layers, dtype)
    if calls is None:
        return []
    verdicts: dict[str, bool] = {}
    fused: list[FusedLayer] = []
    for index, call in enumerate(calls):
        layer = layers[index]
        kind = f"{type(layer)} {call.attention} {call.rotary[0].shape}"
        if kind not in verdicts:
            verdicts[kind] = can_fuse(layer, call)
        parts = LayerParts.of(sources[index] if packed else layer)
        if verdicts[kind] and parts is not None:
            fused.append(FusedLayer(parts, index, call.attention, dtype, packed, kernels_for(parts, call, dtype)))
            layers[index] = fused[-1]
    return fused


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The decoder's layers, in order.

    Raises:
        ValueError: when the model has no list of ``num_hidden_layers`` layers.
    """
    wanted = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == wanted:
            return module
    raise ValueError(f"{type(model).__name__} has no list of {wanted} decoder layers: the engine cannot tap its hidden states")
