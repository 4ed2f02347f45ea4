"""Which decoder layers `FusedLayer` can stand in for: seen from one forward, then proved on random
weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from paceline.rollout.model.attention import (
    SLOT_ATTENTION,
    ForwardBatch,
    chain_seats,
    check_window,
    slot_attention,
)
from paceline.rollout.model.fused_layer import FusedLayer, LayerParts
from paceline.rollout.model.kv_cache import CacheShape, SlotCache
from paceline.rollout.native import Kernels, RaggedTokens, load_kernels
from paceline.rollout.transformers_api import (
    DynamicCache,
    ObservedCall,
    register_attention,
    rotary_in,
    run_causal_lm,
    use_attention,
)

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
        observed: The arguments of the layer.
    """

    rotary: tuple[torch.Tensor, torch.Tensor]
    attention: dict[str, Any]
    observed: ObservedCall


def _probe_attention(
    module: nn.Module, *args: Any, seen_attention: dict[int, dict[str, Any]], **kwargs: Any
) -> Any:
    seen_attention[id(module)] = {
        name: value for name, value in kwargs.items() if name in _RULES and value is not None
    }
    check_window(module, kwargs.get("sliding_window"))
    return slot_attention(module, *args, **kwargs)


register_attention(_PROBE_ATTENTION, _probe_attention)


@torch.no_grad()
def observe_calls(view: PreTrainedModel, layers: nn.ModuleList, dtype: torch.dtype) -> list[LayerCall] | None:
    """Runs a few tokens through the model and notes what each layer is called with; None where a layer gets
    no rotary embedding.

    Args:
        view: A model of the engine's own, whose attention implementation may be set.
        layers: Its decoder layers.
        dtype: What to compute in; parameters of other dtypes are cast on the way.
    """
    device = next(view.parameters()).device
    calls: dict[int, ObservedCall] = {}
    attention: dict[int, dict[str, Any]] = {}

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[id(module)] = ObservedCall(
            args, {name: value for name, value in kwargs.items() if value is not attention}
        )

    hooks = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    use_attention(view, _PROBE_ATTENTION)
    positions = torch.arange(_TOKENS, device=device)[None]
    batch = ForwardBatch(slice(0, 1), chain_seats(positions), span=_TOKENS, from_start=True)
    try:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
            tokens = torch.zeros_like(positions)
            run_causal_lm(
                view, tokens, positions, DynamicCache(), keep=1, forward_batch=batch, seen_attention=attention
            )
    finally:
        use_attention(view, SLOT_ATTENTION)
        for hook in hooks:
            hook.remove()
    found: list[LayerCall] = []
    for layer in layers:
        call, rules = calls.get(id(layer)), attention.get(id(getattr(layer, "self_attn", None)))
        rotary = None if call is None else rotary_in(call.args, call.kwargs)
        if call is None or rotary is None or rules is None:
            return None
        found.append(LayerCall(rotary, rules, call))
    return found


@torch.no_grad()
def can_fuse(layer: nn.Module, call: LayerCall) -> bool:
    """Whether a `FusedLayer` made of the layer's parts computes what the layer computes.

    Asked in float32 on a copy with random weights, so that a part whose present weights hide it (a zero bias,
    a gain of one) is asked too; and in two forwards, so that the second reads what the first has stored.
    """
    original: Any = copy.deepcopy(layer).float().eval()
    generator = torch.Generator().manual_seed(0)
    for parameter in original.parameters():
        parameter.copy_(
            torch.randn(parameter.shape, generator=generator) * (parameter.shape[-1] ** -0.5) + 0.1
        )
    parts = LayerParts.of(original)
    if parts is None:
        return False
    original.self_attn.layer_idx = 0
    hidden = torch.randn(1, _TOKENS, parts.down.out_features, generator=generator).to(call.rotary[0].device)
    dim = call.rotary[0].shape[-1]
    shape = CacheShape(1, parts.qkv[1].out_features // dim, dim, 1, _TOKENS, 0, torch.float32)

    def run(layer: nn.Module, ragged: bool) -> torch.Tensor:
        cache = SlotCache(shape, hidden.device)

        def forward(part: slice, batch: ForwardBatch) -> torch.Tensor:
            cos, sin = (x.float()[:, part].contiguous() for x in call.rotary)
            states = hidden[:, part].contiguous()
            return call.observed.again(layer, states, (cos, sin), batch.positions, cache, forward_batch=batch)

        return in_two_forwards(cache, _TOKENS, ragged, forward)

    try:
        fused = FusedLayer(
            parts,
            0,
            call.attention,
            torch.float32,
            packed=False,
            kernels=kernels_for(parts, call, torch.float32),
        )
        wanted = run(original, ragged=False)
        got = run(fused, ragged=fused.takes_ragged)
    except (RuntimeError, ValueError):  # shapes or norms that a fused layer is not made for
        return False
    return got.shape == wanted.shape and bool((got - wanted).norm() <= _TOLERANCE * wanted.norm())


def in_two_forwards(
    cache: SlotCache,
    tokens: int,
    ragged: bool,
    forward: Callable[[slice, ForwardBatch], torch.Tensor],
    texts: int = 1,
) -> torch.Tensor:
    """Runs all tokens of each text but the last two, then those two, which read what the first forward has
    stored.

    Args:
        cache: An empty cache with a slot for each text.
        tokens: How many a text has, at least 3.
        ragged: Whether the batches hold tokens without padding, for native kernels.
        forward: Runs the tokens of a slice of all texts, whose batch the cache knows; returns them as [texts,
            tokens, …], or end to end where ``ragged``.
        texts: How many are run side by side.

    Returns:
        [texts, tokens, …].
    """
    outputs = []
    positions = torch.arange(tokens, device=cache.device).expand(texts, -1)
    for part in (slice(0, tokens - 2), slice(tokens - 2, tokens)):
        length = part.stop - part.start
        packed = RaggedTokens(range(texts), [part.start] * texts, [length] * texts) if ragged else None
        batch = ForwardBatch(slice(0, texts), chain_seats(positions[:, part]), span=tokens, ragged=packed)
        cache.begin(batch)
        made = forward(part, batch)
        outputs.append(made.view(texts, length, *made.shape[2:]))
    return torch.cat(outputs, dim=1)


def kernels_for(parts: LayerParts, call: LayerCall, dtype: torch.dtype) -> Kernels | None:
    """Native kernels that serve a layer's widths, or None."""
    widths = parts.down.out_features, parts.down.in_features
    served = Kernels.serve(call.rotary[0].shape[-1], *widths)
    return load_kernels(parts.down.weight.device.type, dtype) if served else None


def fuse_layers(
    view: PreTrainedModel, source: PreTrainedModel, dtype: torch.dtype, packed: bool
) -> list[FusedLayer]:
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
            fused.append(
                FusedLayer(parts, index, call.attention, dtype, packed, kernels_for(parts, call, dtype))
            )
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
    raise ValueError(
        f"{type(model).__name__} has no list of {wanted} decoder layers: the engine cannot tap its hidden "
        "states"
    )
