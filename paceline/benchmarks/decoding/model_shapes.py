"""Sizes of two models that are measured and planned for with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from paceline.rollout.graphs.graph_plan import powers_of_two

SHAPES: dict[str, dict[str, Any]] = {
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
}
STRATEGIES = (16, 24, 32, 48, 64)  # tokens to verify per sequence, as in TLT
BATCHES = powers_of_two(32)


def random_model(shape: dict[str, Any], device: str) -> PreTrainedModel:
    """Returns a Llama model of a shape with random bfloat16 weights."""
    config = LlamaConfig(
        **shape,
        max_position_embeddings=8192,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
