"""Sizes of a model: those its config states, and those of the keys and values that its attention stores."""

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

_ATTENTION_LAYER_TYPES = ("full_attention", "sliding_attention", "chunked_attention")


@dataclass(frozen=True, slots=True)
class KeyShape:
    """Describes what a model's attention stores per token.

    Attributes:
        layers: Number of layers that store keys and values.
        kv_heads: Number of key/value heads per layer.
        head_dim: Size of a key, and of a value.
    """

    layers: int
    kv_heads: int
    head_dim: int


def key_shape(config: PretrainedConfig) -> KeyShape:
    """Returns the shape of keys and values according to a config with Llama's names.

    `observed_keys` checks what is really stored.

    Raises:
        ValueError: The config has no attention, or its heads differ between layers.
    """
    text = config.get_text_config()
    try:
        heads: int = text.num_attention_heads
        kv_heads = getattr(text, "num_key_value_heads", None) or heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    except (AttributeError, RuntimeError):  # transformers raises its own error where layers differ
        raise ValueError(
            f"models of type {text.model_type} do not have one key shape for all layers: choose a policy of "
            "another family"
        ) from None
    return KeyShape(text.num_hidden_layers, kv_heads, head_dim)


def intermediate_size(config: PretrainedConfig) -> int:
    """Returns the width of the MLP.

    GPT-2 and OPT have their own names for it; the default is four times the hidden size.
    """
    text = config.get_text_config()
    names = ("intermediate_size", "ffn_dim", "n_inner")
    return next((int(size) for name in names if (size := getattr(text, name, None))), 4 * text.hidden_size)


def check_family(model: PreTrainedModel) -> None:
    """Raises an error for models that do not consist of replaceable attention.

    Raises:
        ValueError: The model is not supported; one line with the reason.
    """
    name, text = type(model).__name__, model.config.get_text_config()
    advice = "choose a policy of another family; docs/models.md lists the tested ones"
    if getattr(model.config, "is_encoder_decoder", False):
        raise ValueError(f"{name} has an encoder: {advice}")
    if not supports_attention_backend(model):
        raise ValueError(
            f"{name} does not let its attention be replaced (transformers' _supports_attention_backend is "
            f"not set): {advice}"
        )
    kinds = sorted(set(getattr(text, "layer_types", None) or ()) - set(_ATTENTION_LAYER_TYPES))
    if kinds:
        raise ValueError(
            f"{name} has layers of type {', '.join(kinds)}, which keep a state instead of keys: {advice}"
        )


@torch.no_grad()
def observed_keys(model: PreTrainedModel) -> KeyShape:
    """Returns the shape of what a model's attention stores, observed in a forward of two tokens.

    The forward uses transformers' own cache.

    Raises:
        ValueError: The layers store something other than keys and values of one shape; one line.
    """
    check_family(model)
    name, text = type(model).__name__, model.config.get_text_config()
    cache = DynamicCache()
    tokens = torch.arange(1, 3, device=model.device)[None] % text.vocab_size
    try:
        reference = copy_sharing(model)
        use_attention(reference, "eager")  # the trainer's own may expect packed sequences
        run_causal_lm(reference, tokens, torch.arange(2, device=model.device)[None], cache)
        stored: list[Any] = cache.layers
        shapes = {(x.shape[1], x.shape[3]) for layer in stored for x in (layer.keys, layer.values)}
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # whatever the model raises instead of storing keys is the reason to report
        raise ValueError(
            f"{name} cannot decode over a cache of keys and values ({error_line(error)}): choose another "
            "policy"
        ) from None
    if not cache.layers:  # keys are stored elsewhere; the engine's check reports it
        return key_shape(model.config)
    if len(shapes) != 1 or len(cache.layers) != text.num_hidden_layers:
        listing = ", ".join(f"{heads} heads of {width}" for heads, width in sorted(shapes))
        raise ValueError(
            f"{name} stores keys and values of several shapes ({listing}; {len(cache.layers)} of "
            f"{text.num_hidden_layers} layers), the engine needs one shape in every "
            "layer: choose another policy"
        )
    (kv_heads, head_dim), *_ = shapes
    return KeyShape(len(cache.layers), kv_heads, head_dim)
