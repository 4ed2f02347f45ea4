"""How long a text may be for a model to compute the same for its beginning whatever comes after, alone or
beside others.

Three things set such a limit. Rotary factors that change with the longest text of a forward (LongRoPE, arXiv
2402.13753, and dynamic NTK): past the original length every earlier token's log-probability changes, so that
what was drawn is not what a later forward trains. Attention in chunks (Llama 4), and a scale of the queries
that grows with the position. A table of positions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

_CHANGING = ("longrope", "dynamic")
_MOST_OFFSET = 8  # rows that a table of learned positions has before that of position 0; OPT's has 2


@dataclass(frozen=True, slots=True)
class TextLimit:
    """The longest text that a model computes exactly.

    Attributes:
        tokens: Of prompt and completion together.
        reason: What it does with more, to be read between its name and "past N tokens".
    """

    tokens: int
    reason: str


def text_limit(model: PreTrainedModel) -> TextLimit | None:
    """The lowest limit that a model sets to its texts, or None."""
    config = model.config.get_text_config()
    limits = [*_rotary_limits(config), *_attention_limits(config), *_table_limits(model)]
    return min(limits, key=lambda limit: limit.tokens, default=None)


def _rotary_limits(config: PretrainedConfig) -> Iterator[TextLimit]:
    parameters = getattr(config, "rope_parameters", None) or {}
    for rope in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        kind = str(rope.get("rope_type", "default"))
        if any(name in kind for name in _CHANGING):
            longest = (
                rope["original_max_position_embeddings"]
                if "longrope" in kind
                else config.max_position_embeddings
            )
            yield TextLimit(int(longest), f"changes its rotary factors ({kind})")


def _attention_limits(config: PretrainedConfig) -> Iterator[TextLimit]:
    if "chunked_attention" in (getattr(config, "layer_types", None) or ()):
        yield TextLimit(int(config.attention_chunk_size), "attends within chunks only")
    if getattr(config, "attn_temperature_tuning", False):
        yield TextLimit(int(config.floor_scale) - 1, "scales its queries by their position")


def _table_limits(model: PreTrainedModel) -> Iterator[TextLimit]:
    longest = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if longest is not None and has_position_table(model):
        yield TextLimit(int(longest), "has no learned positions")


def has_position_table(model: PreTrainedModel) -> bool:
    """Whether positions are looked up in a table (GPT-2, OPT), whose end no position may pass."""
    longest, words = (
        getattr(model.config.get_text_config(), "max_position_embeddings", None),
        model.get_input_embeddings(),
    )
    if longest is None:
        return False
    tables = (m for m in model.modules() if isinstance(m, nn.Embedding) and m is not words)
    return any(longest <= table.num_embeddings <= longest + _MOST_OFFSET for table in tables)


@torch.no_grad()
def fix_rotary(view: PreTrainedModel) -> None:
    """Makes a model's rotary embeddings those of texts within its limit, for good.

    They would otherwise follow the largest position of a forward, which may be another sequence's, or that of
    padding or of a draft past the end of a text; and their buffers are shared with the trainer's module,
    which may see longer texts.

    Args:
        view: The engine's own copy of the model; changed in place.
    """
    for module in view.modules():
        kinds: Any = getattr(module, "rope_type", None)
        by_layer = isinstance(kinds, dict)
        for layer, kind in kinds.items() if by_layer else [(None, kinds)]:
            if not isinstance(kind, str) or not any(name in kind for name in _CHANGING):
                continue
            prefix = f"{layer}_" if by_layer else ""
            original = getattr(module, f"{prefix}original_inv_freq")
            device = getattr(module, f"{prefix}inv_freq").device
            module.register_buffer(f"{prefix}inv_freq", original.clone().to(device), persistent=False)
            if by_layer:
                kinds[layer] = "default"
            else:
                module.rope_type = "default"  # type: ignore[assignment]  # transformers updates the factors of other types only
