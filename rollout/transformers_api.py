"""The engine's contract with transformers: the keywords, and the cache and attention interfaces, that the
engine relies on.

transformers renames keywords between minor releases: 5.24 calls ``cache`` what 5.23 called
    ``past_key_values``, in models, in
decoder layers and in attention modules. The engine therefore recognizes what a model hands to its layers by
type, never by name, and looks up the one name that it has to write itself. What it relies on:

- a causal LM's forward takes ``input_ids``, ``position_ids``, ``use_cache``, ``logits_to_keep`` and one
  argument annotated as a `Cache`, returns ``logits``, and hands keyword arguments that it does not know to
  its layers and attention functions;
- a decoder layer takes hidden states [B, Q, hidden], one pair (cos, sin) and the cache, under any names;
- attention functions come from `AttentionInterface`; for one whose name the mask functions do not know, no
  mask is made;
- an attention module stores keys and values through `Cache.update(keys, values, layer_index)` and attends
  over what that returns.

`paceline.rollout.model.view_check` tests all of this on a few tokens whenever an engine is built. The names
of a decoder layer's parts are in `paceline.rollout.model.fused_layer`, which does not replace a layer that
has other parts.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import transformers
from torch import nn
from transformers import AttentionInterface, Cache, DynamicCache, PreTrainedModel

__all__ = [
    "TESTED_RELEASES",
    "Cache",
    "DynamicCache",
    "ObservedCall",
    "cache_argument",
    "hidden_states_in",
    "of_type",
    "register_attention",
    "rotary_in",
    "run_causal_lm",
    "supports_attention_backend",
    "use_attention",
    "version",
]

TESTED_RELEASES = ">=5.17,<5.25"  # as in pyproject.toml; a test compares the two
_CACHE_NAMES = ("cache", "past_key_values")

T = TypeVar("T")


def version() -> str:
    """The installed release of transformers."""
    return transformers.__version__


def supports_attention_backend(model: PreTrainedModel) -> bool:
    """Whether the model's attention modules call a function that can be replaced."""
    return bool(getattr(model, "_supports_attention_backend", False))


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Makes an attention function known under ``name``, for `use_attention`."""
    AttentionInterface.register(name, function)


def use_attention(model: PreTrainedModel, name: str) -> None:
    """Makes every attention module of the model call the function registered as ``name``."""
    model.set_attn_implementation(name)


def run_causal_lm(
    model: PreTrainedModel,
    tokens: torch.Tensor,
    positions: torch.Tensor,
    cache: Cache,
    keep: int | torch.Tensor = 0,
    **through: Any,
) -> torch.Tensor:
    """Runs a causal LM over a cache.

    Args:
        model: The model.
        tokens: int64 [B, Q].
        positions: int64 [B, Q], position of each token in its text.
        cache: Where keys and values are stored and read.
        keep: Indices int64 [K] of the tokens whose logits are wanted; 0 for all, n > 0 for the last n.
        through: Keyword arguments for the attention functions.

    Returns:
        Logits [B, Q or K, V].

    Raises:
        TypeError: when the model's forward takes no cache.
    """
    names = {cache_argument(type(model).forward): cache}
    out = model(
        input_ids=tokens, position_ids=positions, use_cache=True, logits_to_keep=keep, **names, **through
    )
    return out.logits


@functools.cache
def cache_argument(forward: Callable[..., Any]) -> str:
    """The name of the argument that takes a cache, in the forward of a model, a decoder layer or an attention
    module.

    Raises:
        TypeError: when it has none.
    """
    parameters = inspect.signature(forward).parameters
    for name in _CACHE_NAMES:
        if name in parameters:
            return name
    for name, parameter in parameters.items():
        if "Cache" in str(parameter.annotation):
            return name
    raise TypeError(f"{forward.__qualname__} takes no argument that is annotated as a Cache")


def of_type(kind: type[T], args: Sequence[Any], kwargs: Mapping[str, Any]) -> T:
    """The first argument of a call that is an instance of ``kind``.

    Raises:
        TypeError: when there is none.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, kind):
            return value
    raise TypeError(f"transformers {version()} hands no {kind.__name__} to its decoder layers")


def hidden_states_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """The hidden states [B, Q, hidden] among the arguments of a decoder layer or an output head.

    Raises:
        TypeError: when there are none.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.ndim == 3 and value.is_floating_point():
            return value
    raise TypeError(f"transformers {version()} hands no hidden states to its decoder layers")


def rotary_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The pair (cos, sin) among the arguments of a decoder layer; None for a model without rotary
    embeddings.
    """
    for value in (*args, *kwargs.values()):
        if _is_rotary(value):
            return value
    return None


def _is_rotary(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(x, torch.Tensor) for x in value)


@dataclass(frozen=True, slots=True)
class ObservedCall:
    """The arguments that a model handed to one of its decoder layers, to call a layer of that kind again.

    Attributes:
        args, kwargs: The arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def again(
        self,
        layer: nn.Module,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        positions: torch.Tensor,
        cache: Cache,
        **through: Any,
    ) -> torch.Tensor:
        """Calls a layer with other tensors in the places of those observed.

        Args:
            layer: The layer.
            hidden_states: [B, Q, hidden].
            rotary: cos and sin [B, Q, d].
            positions: int64 [B, Q].
            cache: Where the layer stores keys and values.
            through: Keyword arguments for the attention function, in the places of those of the same name.

        Returns:
            The layer's output [B, Q, hidden].
        """

        def replaced(value: Any) -> Any:
            if isinstance(value, Cache):
                return cache
            if _is_rotary(value):
                return rotary
            if isinstance(value, torch.Tensor):
                return hidden_states if value.is_floating_point() else positions
            return value

        args = [replaced(value) for value in self.args]
        kwargs = {name: replaced(value) for name, value in self.kwargs.items()}
        out = layer(*args, **{**kwargs, **through})
        return out[0] if isinstance(out, tuple) else out
