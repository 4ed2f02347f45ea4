"""The only module that depends on transformers' keywords and on its cache and attention interfaces.

transformers renames keywords between minor releases: what 5.23 called ``past_key_values`` in models, decoder
layers and attention modules, 5.24 calls ``cache``. The engine therefore recognizes what a model passes to its
layers by type, never by name, and looks up the one name that it has to write itself. It relies on the
following:

- a causal LM's forward takes ``input_ids``, ``position_ids``, ``use_cache``, ``logits_to_keep`` and one
  argument annotated as a `Cache`, returns ``logits``, and passes keyword arguments that it does not know on
  to its layers and attention functions;
- a decoder layer takes hidden states [B, Q, hidden], one pair (cos, sin) and the cache, under any names;
- attention functions come from `AttentionInterface`, and no mask is built for a function whose name the mask
  functions do not know;
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
    "first_instance",
    "hidden_states_in",
    "register_attention",
    "rotary_in",
    "run_causal_lm",
    "supports_attention_backend",
    "use_attention",
    "version",
]

TESTED_RELEASES = ">=5.17,<5.25"  # equal to the range in pyproject.toml, which a test checks
_CACHE_NAMES = ("cache", "past_key_values")

T = TypeVar("T")


def version() -> str:
    """Returns the installed release of transformers."""
    return transformers.__version__


def supports_attention_backend(model: PreTrainedModel) -> bool:
    """Returns whether the model's attention modules call a replaceable attention function."""
    return bool(getattr(model, "_supports_attention_backend", False))


def register_attention(name: str, function: Callable[..., Any]) -> None:
    """Registers an attention function under ``name``, for `use_attention`."""
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
    **attention_kwargs: Any,
) -> torch.Tensor:
    """Runs a causal LM over a cache.

    Args:
        model: Model to run.
        tokens: Token ids, int64 [B, Q].
        positions: Position of each token in its text, int64 [B, Q].
        cache: Cache that stores and returns keys and values.
        keep: Indices int64 [K] of the tokens whose logits are returned; 0 for all, n > 0 for the last n.
        attention_kwargs: Keyword arguments passed through the model to its attention functions.

    Returns:
        Logits [B, Q or K, V].

    Raises:
        TypeError: The model's forward takes no cache.
    """
    names = {cache_argument(type(model).forward): cache}
    out = model(
        input_ids=tokens,
        position_ids=positions,
        use_cache=True,
        logits_to_keep=keep,
        **names,
        **attention_kwargs,
    )
    return out.logits


@functools.cache
def cache_argument(forward: Callable[..., Any]) -> str:
    """Returns the name of a forward's cache argument.

    Args:
        forward: Forward of a model, a decoder layer or an attention module.

    Raises:
        TypeError: It has no such argument.
    """
    parameters = inspect.signature(forward).parameters
    for name in _CACHE_NAMES:
        if name in parameters:
            return name
    for name, parameter in parameters.items():
        if "Cache" in str(parameter.annotation):
            return name
    raise TypeError(f"{forward.__qualname__} takes no argument annotated as a Cache")


def first_instance(kind: type[T], args: Sequence[Any], kwargs: Mapping[str, Any]) -> T:
    """Returns the first argument of a call that is an instance of ``kind``.

    Raises:
        TypeError: There is none.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, kind):
            return value
    raise TypeError(f"transformers {version()} passes no {kind.__name__} to this model's decoder layers")


def hidden_states_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> torch.Tensor:
    """Returns the hidden states [B, Q, hidden] among the arguments of a decoder layer or an output head.

    Raises:
        TypeError: There are none.
    """
    for value in (*args, *kwargs.values()):
        if isinstance(value, torch.Tensor) and value.ndim == 3 and value.is_floating_point():
            return value
    raise TypeError(
        f"transformers {version()} passes no hidden states [B, Q, hidden] to this model's decoder layers"
    )


def rotary_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Returns the pair (cos, sin) among a decoder layer's arguments, or None without rotary embeddings."""
    for value in (*args, *kwargs.values()):
        if _is_rotary(value):
            return value
    return None


def _is_rotary(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(isinstance(x, torch.Tensor) for x in value)


@dataclass(frozen=True, slots=True)
class ObservedCall:
    """Records the arguments that a model passed to a decoder layer, so that the call can be repeated.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def replay(
        self,
        layer: nn.Module,
        hidden_states: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        positions: torch.Tensor,
        cache: Cache,
        **attention_kwargs: Any,
    ) -> torch.Tensor:
        """Calls a layer with the given tensors in place of the observed ones.

        Args:
            layer: Layer to call.
            hidden_states: Hidden states, [B, Q, hidden].
            rotary: cos and sin, [B, Q, d] each.
            positions: Position of each token, int64 [B, Q].
            cache: Cache that the layer stores keys and values in.
            attention_kwargs: Keyword arguments for the attention function; they replace observed ones of the
                same name.

        Returns:
            Output of the layer, [B, Q, hidden].
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
        out = layer(*args, **{**kwargs, **attention_kwargs})
        return out[0] if isinstance(out, tuple) else out
