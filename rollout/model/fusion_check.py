"""Decides which decoder layers `FusedLayer` can replace, by a comparison on random weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
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
from paceline.rollout.native import AnyKernels, RaggedTokens, load_kernels
from paceline.rollout.transformers_api import (
    DynamicCache,
    ObservedCall,
    register_attention,
    rotary_in,
    run_causal_lm,
    use_attention,
)

_PROBE_ATTENTION = "paceline_probe"
_ATTENTION_ARGUMENTS = ("scaling", "sliding_window", "softcap", "s_aux")
_TOKENS = 5  # enough for two forwards, of which the second reads the first one's keys
_TOLERANCE = 1e-4  # of the output's norm; rounding in float32 stays below it


@dataclass(slots=True)
class LayerCall:
    """Records what a model passes to one of its layers, and the layer to its attention function.

    Attributes:
        rotary: cos and sin, [1, Q, d] each.
        attention: Keyword arguments of the attention function.
        observed: Arguments of the layer.
    """

    rotary: tuple[torch.Tensor, torch.Tensor]
    attention: dict[str, Any]
    observed: ObservedCall


def _probe_attention(
    module: nn.Module, *args: Any, seen_attention: dict[int, dict[str, Any]], **kwargs: Any
) -> Any:
    """Records the arguments of an attention function, then computes attention."""
    seen_attention[id(module)] = {
        name: value for name, value in kwargs.items() if name in _ATTENTION_ARGUMENTS and value is not None
    }
    check_window(module, kwargs.get("sliding_window"))
    return slot_attention(module, *args, **kwargs)


register_attention(_PROBE_ATTENTION, _probe_attention)


@torch.no_grad()
def observe_calls(view: PreTrainedModel, layers: nn.ModuleList, dtype: torch.dtype) -> list[LayerCall] | None:
    """Runs a few tokens through the model and records what each layer is called with.

    Args:
        view: The engine's own copy of the model, whose attention implementation may be changed.
        layers: Decoder layers of the copy.
        dtype: Compute dtype; parameters of other dtypes are cast on the way.

    Returns:
        The call of each layer, or None if a layer gets no rotary embedding.
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
    layer_calls: list[LayerCall] = []
    for layer in layers:
        call, arguments = calls.get(id(layer)), attention.get(id(getattr(layer, "self_attn", None)))
        rotary = None if call is None else rotary_in(call.args, call.kwargs)
        if call is None or rotary is None or arguments is None:
            return None
        layer_calls.append(LayerCall(rotary, arguments, call))
    return layer_calls


@contextmanager
def exact_products() -> Iterator[None]:
    """Computes float32 products on a GPU in float32, within a context.

    Many trainers allow TF32, whose rounding is larger than the tolerances of the engine's checks.
    """
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


@torch.no_grad()
@exact_products()
def can_fuse(layer: nn.Module, call: LayerCall) -> bool:
    """Returns whether a `FusedLayer` made of the layer's parts computes what the layer computes.

    The comparison runs in float32 on a copy with random weights, so that it also covers parts whose current
    weights hide them (a zero bias, a gain of one). It takes two forwards, so that the second reads what the
    first has stored.

    Args:
        layer: Decoder layer.
        call: Observed call of the layer.
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

    def run(layer: nn.Module, kernels: AnyKernels | None) -> torch.Tensor:
        cache = SlotCache(shape, hidden.device)

        def forward(part: slice, batch: ForwardBatch) -> torch.Tensor:
            cos, sin = (x.float()[:, part].contiguous() for x in call.rotary)
            states = hidden[:, part].contiguous()
            return call.observed.replay(
                layer, states, (cos, sin), batch.positions, cache, forward_batch=batch
            )

        return in_two_forwards(cache, _TOKENS, kernels, forward)

    try:
        fused = FusedLayer(
            parts,
            0,
            call.attention,
            torch.float32,
            packed=False,
            kernels=kernels_for(parts, call, torch.float32),
        )
        expected = run(original, None)
        actual = run(fused, fused.kernels if fused.takes_ragged else None)
    except (RuntimeError, ValueError):  # shapes or norms that a fused layer does not support
        return False
    return actual.shape == expected.shape and bool((actual - expected).norm() <= _TOLERANCE * expected.norm())


def which_fuse(layers: nn.ModuleList, calls: Sequence[LayerCall]) -> list[bool]:
    """Returns for each layer what `can_fuse` says of its kind, which is compared once."""
    verdicts: dict[str, bool] = {}
    fusible = []
    for layer, call in zip(layers, calls, strict=True):
        kind = f"{type(layer)} {call.attention} {call.rotary[0].shape}"
        if kind not in verdicts:
            verdicts[kind] = can_fuse(layer, call)
        fusible.append(verdicts[kind])
    return fusible


def in_two_forwards(
    cache: SlotCache,
    tokens: int,
    kernels: AnyKernels | None,
    forward: Callable[[slice, ForwardBatch], torch.Tensor],
    texts: int = 1,
) -> torch.Tensor:
    """Runs each text in two forwards: all tokens but the last two, then those two, which read the cache.

    Args:
        cache: Empty cache with a slot for each text.
        tokens: Number of tokens in each text, at least 3.
        kernels: Kernels for which the batches hold tokens without padding; None pads them.
        forward: Function that runs a slice of all texts' tokens, given the slice and its batch. It returns
            [texts, tokens, …], or the tokens end to end for ``kernels``.
        texts: Number of texts in the batch.

    Returns:
        [texts, tokens, …].
    """
    outputs = []
    positions = torch.arange(tokens, device=cache.device).expand(texts, -1)
    for part in (slice(0, tokens - 2), slice(tokens - 2, tokens)):
        length = part.stop - part.start
        batch = ForwardBatch(slice(0, texts), chain_seats(positions[:, part]), span=tokens)
        if kernels is not None:
            ragged = RaggedTokens(range(texts), [part.start] * texts, [length] * texts)
            batch.ragged = kernels.describe(ragged, cache.device)
        cache.begin(batch)
        output = forward(part, batch)
        outputs.append(output.view(texts, length, *output.shape[2:]))
    return torch.cat(outputs, dim=1)


def kernels_for(parts: LayerParts, call: LayerCall, dtype: torch.dtype) -> AnyKernels | None:
    """Returns native kernels that support a layer's widths, or None."""
    kernels = load_kernels(parts.down.weight.device.type, dtype)
    widths = parts.down.out_features, parts.down.in_features
    return kernels if kernels is not None and kernels.serve(call.rotary[0].shape[-1], *widths) else None


def fuse_layers(
    view: PreTrainedModel, source: PreTrainedModel, dtype: torch.dtype, packed: bool
) -> list[FusedLayer]:
    """Replaces each of the view's decoder layers that allow it by a `FusedLayer`.

    Args:
        view: The engine's own copy of the model; changed in place.
        source: The trainer's model, whose weights packed layers are made of.
        dtype: Compute dtype.
        packed: Whether linear layers are packed; otherwise the fused layers read the view's own weights.

    Returns:
        The new layers; empty for a model without a list of decoder layers.
    """
    try:
        layers, sources = decoder_layers(view), decoder_layers(source)
    except ValueError:
        return []
    calls = observe_calls(view, layers, dtype)
    if calls is None:
        return []
    verdicts = which_fuse(layers, calls)
    fused: list[FusedLayer] = []
    for index, (call, fusible) in enumerate(zip(calls, verdicts, strict=True)):
        parts = LayerParts.of(sources[index] if packed else layers[index])
        if fusible and parts is not None:
            fused.append(
                FusedLayer(parts, index, call.attention, dtype, packed, kernels_for(parts, call, dtype))
            )
            layers[index] = fused[-1]
    return fused


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """Returns the decoder's layers, in order.

    Raises:
        ValueError: The model has no list of ``num_hidden_layers`` layers.
    """
    num_layers = model.config.get_text_config().num_hidden_layers
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == num_layers:
            return module
    raise ValueError(
        f"{type(model).__name__} has no list of {num_layers} decoder layers to tap: build the engine without "
        "tap_layers, or choose another policy"
    )
