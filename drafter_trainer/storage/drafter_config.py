"""Reads and validates a drafter's ``config.json``.

The file may come from another project, be truncated, or have been edited by hand.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from transformers import LlamaConfig

from paceline.drafter_trainer.errors import DrafterError
from paceline.drafter_trainer.storage.json_object import read_object
from paceline.rollout.drafters.eagle3_model import ARCHITECTURE, MASK_TOKEN

_TAPS = "eagle_aux_hidden_state_layer_ids"
_COUNTS = (
    *(
        "vocab_size",
        "draft_vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_attention_heads",
        "num_key_value_heads",
    ),
    *("head_dim", "max_position_embeddings"),
)
# Variants of the layer that servers support and `Eagle3Model` does not implement.
_UNSUPPORTED = ("norm_before_residual", "attention_bias", "mlp_bias")
# Keys about the directory, not the layer; `LlamaConfig` also rejects the model_type of another class.
_IGNORED = (
    "model_type",
    "torch_dtype",
    "dtype",
    "rope_theta",
    "transformers_version",
    "eagle_config",
    "auto_map",
)


def read_drafter_config(directory: Path) -> LlamaConfig:
    """Reads the configuration of a drafter in the form that `eagle3_config` returns.

    Raises:
        DrafterError: The file is missing, is not JSON, or describes something other than an EAGLE-3 layer.
    """
    path = directory / "config.json"
    data = read_object(
        path,
        DrafterError,
        "missing; name a directory that paceline export or paceline warmup --drafter wrote",
    )
    if data.get("architectures") != [ARCHITECTURE]:
        raise DrafterError(
            f"{path}: architectures is {_short(data.get('architectures'))}; only [{ARCHITECTURE!r}] can be "
            f"used"
        )
    _fill_in(data)
    problem = _problem(data)
    if problem is not None:
        raise DrafterError(f"{path}: {problem}")
    try:
        return LlamaConfig(**{key: value for key, value in data.items() if key not in _IGNORED})
    except Exception as error:  # transformers raises many types for the other keys
        raise DrafterError(f"{path}: transformers cannot read it ({_short(error)})") from None


def _fill_in(data: dict[str, Any]) -> None:
    """Adds keys that other writers store under another name, or omit because they follow from the rest."""
    nested = data.get("eagle_config")
    if _TAPS not in data and isinstance(nested, dict) and _TAPS in nested:
        data[_TAPS] = nested[_TAPS]
    if "rope_parameters" not in data and data.get("rope_scaling") is None:
        data["rope_parameters"] = {"rope_type": "default", "rope_theta": data.get("rope_theta", 10000.0)}
    if data.get("num_key_value_heads") is None:
        data["num_key_value_heads"] = data.get("num_attention_heads")
    heads, width = data.get("num_attention_heads"), data.get("hidden_size")
    if data.get("head_dim") is None and _is_count(heads) and _is_count(width):
        data["head_dim"] = width // heads  # type: ignore[operator]


def _problem(data: dict[str, Any]) -> str | None:
    """Returns what is wrong with the first key whose value cannot be used; None if all can."""
    for key in _COUNTS:
        if not _is_count(data.get(key)):
            return f"{key} is {_short(data.get(key))}; write a whole number above 0"
    mask = data.get(MASK_TOKEN)
    if mask is not None and not (_is_count(mask, least=0) and mask < data["vocab_size"]):
        return f"{MASK_TOKEN} is {_short(mask)}; write a token id below vocab_size, {data['vocab_size']}"
    taps = data.get(_TAPS)
    if not isinstance(taps, list) or len(taps) != 3 or not all(_is_count(layer, least=0) for layer in taps):
        return f"{_TAPS} is {_short(taps)}; write the three layers whose inputs the drafter was trained on"
    if data.get("num_hidden_layers") != 1:
        return f"num_hidden_layers is {_short(data.get('num_hidden_layers'))}; an EAGLE-3 drafter has 1"
    if data["draft_vocab_size"] > data["vocab_size"]:
        return (
            f"draft_vocab_size is {data['draft_vocab_size']}; write at most vocab_size, {data['vocab_size']}"
        )
    if data["num_attention_heads"] % data["num_key_value_heads"] or data["head_dim"] % 2:
        return "num_attention_heads must be a multiple of num_key_value_heads, and head_dim even"
    if data.get("target_hidden_size") not in (None, data["hidden_size"]):
        return (
            f"target_hidden_size is {_short(data['target_hidden_size'])}; only drafters as wide as their "
            f"target can be used"
        )
    for key in _UNSUPPORTED:
        if data.get(key):
            return f"{key} is {_short(data[key])}; only drafters without it can be used"
    if data.get("hidden_act", "silu") != "silu":
        return f"hidden_act is {_short(data['hidden_act'])}; only drafters with silu can be used"
    epsilon = data.get("rms_norm_eps", 1e-5)
    if isinstance(epsilon, bool) or not isinstance(epsilon, int | float) or not 0 <= epsilon < 1:
        return f"rms_norm_eps is {_short(epsilon)}; write a number such as 1e-05"
    return _rope_problem(data)


def _rope_problem(data: dict[str, Any]) -> str | None:
    """Returns why the rotary embedding cannot be used; None if it can."""
    if data.get("rope_scaling") is not None:
        return "rope_scaling is set; only drafters with unscaled rotary embeddings can be used"
    rope = data.get("rope_parameters")
    if (
        not isinstance(rope, dict)
        or rope.get("rope_type", "default") != "default"
        or not rope.keys() <= {"rope_type", "rope_theta"}
    ):
        return f"rope_parameters is {_short(rope)}; only rope_type default with a rope_theta can be used"
    theta = rope.get("rope_theta")
    if (
        isinstance(theta, bool)
        or not isinstance(theta, int | float)
        or not (math.isfinite(theta) and theta > 0)
    ):
        return f"rope_theta is {_short(theta)}; write a number above 0"
    return None


def _is_count(value: Any, least: int = 1) -> bool:
    """Returns whether a value is a whole number from ``least`` that fits int32."""
    return isinstance(value, int) and not isinstance(value, bool) and least <= value < 2**31


def _short(value: Any) -> str:
    """Returns a value or an error's message on one line of at most 120 characters."""
    text = " ".join((repr(value) if not isinstance(value, Exception) else str(value)).split())
    return text if len(text) <= 120 else text[:119] + "…"
