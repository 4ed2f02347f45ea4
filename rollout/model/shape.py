"""Widths of a model: what its config says, and what its attention stores."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel

from paceline.rollout.model.inference_view import copy_sharing
from paceline.rollout.transformers_api import (
    DynamicCache,
    run_causal_lm,
    supports_attention_backend,
    use_attention,
)
from paceline.rollout.values import error_line

_LAYERS = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True, slots=True)
class KeyShape:
    """What a model's attention stores of a token.

    Attributes:
        layers: That store keys and values.
        kv_heads: Of each layer.
        head_dim: Numbers of a key, and of a value.
    """

    layers: int
    kv_heads: int
    head_dim: int


def key_shape(config: PretrainedConfig) -> KeyShape:
    """What the attention of a model of this config stores, as Llama's names for it say; `observed_keys` sees
    what is stored.

    Raises:
        ValueError: for a config without attention, or with heads that differ from layer to layer.
    """
    text = config.get_text_config()
    try:
        heads: int = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    except (AttributeError, RuntimeError):  # transformers raises one of its own where layers differ
        raise ValueError(
            f"models of type {text.model_type} do not say one shape of keys for all layers: choose a policy "
            "of another family"
        ) from None
    return KeyShape(text.num_hidden_layers, kv_heads, head_dim)


def intermediate_size(config: PretrainedConfig) -> int:
    """Width of the feed-forward part: GPT-2 and OPT have names of their own for it, and four times the hidden
    size by default.
    """
    text = config.get_text_config()
    names = ("intermediate_size", "ffn_dim", "n_inner")
    return next((int(size) for name in names if (size := getattr(text, name, None))), 4 * text.hidden_size)


def check_family(model: PreTrainedModel) -> None:
    """Refuses models that are not made of attention which can be replaced.

    Raises:
        ValueError: in one line, with the reason.
    """
    name, text = type(model).__name__, model.config.get_text_config()
    advice = "choose a policy of another family, docs/models.md lists those that are tested"
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} has an encoder: {advice}")
    if not supports_attention_backend(model):
        raise ValueError(
            f"{name} does not let its attention be replaced (transformers' _supports_attention_backend is "
            f"not set): {advice}"
        )
    kinds = sorted(set(getattr(text, "layer_types", None) or ()) - set(_LAYERS))
    if kinds:
        raise ValueError(
            f"{name} has layers of the kind {', '.join(kinds)}, which keep a state instead of keys: {advice}"
        )


@torch.no_grad()
def observed_keys(model: PreTrainedModel) -> KeyShape:
    """What a model's attention stores, seen from a forward of two tokens over transformers' own cache.

    Raises:
        ValueError: in one line, for a model whose layers keep something else than keys and values of one
            shape.
    """
    check_family(model)
    name, text = type(model).__name__, model.config.get_text_config()
    cache = DynamicCache()
    tokens = torch.arange(1, 3, device=model.device)[None] % text.vocab_size
    try:
        reference = copy_sharing(model)
        use_attention(reference, "eager")  # the trainer's may be one over packed lines
        run_causal_lm(reference, tokens, torch.arange(2, device=model.device)[None], cache)
        stored: list[Any] = cache.layers
        shapes = {(x.shape[1], x.shape[3]) for layer in stored for x in (layer.keys, layer.values)}
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever a model does in place of storing keys is the reason to give
        raise ValueError(
            f"{name} cannot decode over a cache of keys and values ({error_line(error)}): choose another "
            "policy"
        ) from None
    if not cache.layers:  # stored elsewhere, which the engine's check will tell
        return key_shape(model.config)
    if len(shapes) != 1 or len(cache.layers) != text.num_hidden_layers:
        found = ", ".join(f"{heads} heads of {width}" for heads, width in sorted(shapes))
        raise ValueError(
            f"{name} stores keys and values of several shapes ({found}; {len(cache.layers)} of "
            f"{text.num_hidden_layers} layers), "
            "the engine one shape in every layer: choose another policy"
        )
    (kv_heads, head_dim), *_ = shapes
    return KeyShape(len(cache.layers), kv_heads, head_dim)
