"""Limits on the text length within which a model's outputs for a prefix do not depend on what follows.

Three things set such a limit: rotary factors that change with the longest text of a forward (LongRoPE, arXiv
2402.13753, and dynamic NTK); attention in chunks (Llama 4) and a query scale that grows with the position;
and a table of positions. With changing rotary factors, the log-prob of every earlier token changes past the
original length, so the sampled distribution is not the one that a later forward trains.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

_LENGTH_DEPENDENT_ROPE = ("longrope", "dynamic")
_MAX_POSITION_OFFSET = 8  # rows of a position table that may precede position 0; OPT's has 2


@dataclass(frozen=True, slots=True)
class TextLimit:
    """States the longest text that a model computes exactly.

    Attributes:
        tokens: Maximum number of tokens of prompt and completion together.
        reason: What the model does with longer texts, phrased to fit between its name and "past N tokens".
    """

    tokens: int
    reason: str


def text_limit(model: PreTrainedModel) -> TextLimit | None:
    """Returns the lowest limit that a model sets on its texts, or None."""
    config = model.config.get_text_config()
    limits = [*_rotary_limits(config), *_attention_limits(config), *_table_limits(model)]
    return min(limits, key=lambda limit: limit.tokens, default=None)


def _rotary_limits(config: PretrainedConfig) -> Iterator[TextLimit]:
    """Yields the lengths past which rotary factors change."""
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        kind = str(rope.get("rope_type", "default"))
        if any(name in kind for name in _LENGTH_DEPENDENT_ROPE):
            longest = (
                rope["original_max_position_embeddings"]
                if "longrope" in kind
                else config.max_position_embeddings
            )
            yield TextLimit(int(longest), f"changes its rotary factors ({kind})")


def _attention_limits(config: PretrainedConfig) -> Iterator[TextLimit]:
    """Yields the lengths past which attention is chunked or rescaled."""
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        yield TextLimit(int(config.attention_chunk_size), "attends within chunks only")
    if getattr(config, "attn_temperature_tuning", False):
        yield TextLimit(int(config.floor_scale) - 1, "scales its queries by their position")


def _table_limits(model: PreTrainedModel) -> Iterator[TextLimit]:
    """Yields the length of a table of learned positions."""
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and has_position_table(model):
        yield TextLimit(int(longest), "has no learned positions")


def has_position_table(model: PreTrainedModel) -> bool:
    """Returns whether positions are looked up in a table (GPT-2, OPT).

    No position may exceed the end of such a table.
    """
    longest, token_table = (
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        model.get_input_embeddings(),
    )
    if longest is None:
        return False
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not token_table)
    return any(longest <= table.num_embeddings <= longest + _MAX_POSITION_OFFSET for table in tables)


@torch.no_grad()
def fix_rotary(view: PreTrainedModel) -> None:
    """Fixes a model's rotary embeddings to those of texts within its limit, permanently.

    They would otherwise follow the largest position of a forward, which may belong to another sequence, to
    padding, or to a draft past the end of a text. Their buffers are also shared with the trainer's module,
    which may see longer texts.

    Args:
        view: The engine's own copy of the model; changed in place.
    """
    for module in view.modules():
        kinds: Any = getattr(module, "rope_type", None)
        by_layer = isinstance(kinds, dict)
        for layer, kind in kinds.items() if by_layer else [(None, kinds)]:
            if not isinstance(kind, str) or not any(name in kind for name in _LENGTH_DEPENDENT_ROPE):
                continue
            prefix = f"{layer}_" if by_layer else ""
            original = getattr(module, f"{prefix}original_inv_freq")
            device = getattr(module, f"{prefix}inv_freq").device
            module.register_buffer(f"{prefix}inv_freq", original.clone().to(device), persistent=False)
            if by_layer:
                kinds[layer] = "default"
            else:
                module.rope_type = "default"  # type: ignore[assignment]  # transformers updates the factors of other types only
