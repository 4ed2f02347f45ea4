"""Creates a small random policy of the same architecture as another, to try a recipe on within seconds."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from paceline.rl.models.loading import copy_tokenizer
from paceline.rl.models.policies import fetch_policy

LAYERS = 4
_HIDDEN, _HEADS = 64, 4
_SIZE_LIMITS = {  # by the names that transformers' configurations give to sizes
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "word_embed_proj_dim"), _HIDDEN),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "n_inner", "moe_intermediate_size"), 2 * _HIDDEN),
    **dict.fromkeys(("shared_expert_intermediate_size", "intermediate_size_mlp"), 2 * _HIDDEN),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head"), _HEADS),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **dict.fromkeys(("n_group", "topk_group", "first_k_dense_replace"), 1),
    **dict.fromkeys(
        ("head_dim", "rotary_dim", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim"), _HIDDEN // _HEADS
    ),
    **dict.fromkeys(("qk_head_dim", "q_lora_rank", "kv_lora_rank"), 2 * _HIDDEN // _HEADS),
}


def tiny_config(policy: PreTrainedConfig) -> PreTrainedConfig:
    """Returns a small version of a text model's configuration.

    Only sizes change, so that the model runs the same code.

    Args:
        policy: Configuration of the policy; for a multimodal model, its text model is used.
    """
    config = copy.deepcopy(policy.get_text_config())
    heads, layers = int(config.num_attention_heads), int(config.num_hidden_layers)
    known = config.to_dict()
    head = int(known.get("head_dim") or config.hidden_size // heads)
    for name, limit in _SIZE_LIMITS.items():
        value = known.get(name)
        if isinstance(value, int) and not isinstance(value, bool) and value > limit:
            setattr(config, name, limit)
    if (kv := known.get("num_key_value_heads")) is not None:
        config.num_key_value_heads = int(config.num_attention_heads) if kv == heads else min(kv, 2)
    if layers > LAYERS:
        _shorten_lists(config, known, layers)
    _shorten_factors(config, head)
    return config


def _shorten_lists(config: PreTrainedConfig, known: dict[str, Any], layers: int) -> None:
    """Shortens lists that have an entry for each layer, and keeps an entry for every kind of layer."""
    for name, value in known.items():
        if isinstance(value, list) and len(value) == layers:
            kinds = [kind for i, kind in enumerate(value) if kind not in value[:i]]
            setattr(config, name, [*kinds, *value][:LAYERS])


def _shorten_factors(config: PreTrainedConfig, head: int) -> None:
    """Shortens lists with a rotary factor for each frequency to the frequencies of the smaller heads.

    Args:
        config: The small configuration, changed in place.
        head: Head dimension of the original.
    """
    rope = getattr(config, "rope_parameters", None)
    if isinstance(rope, dict):
        small_head = int(
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        for key, value in rope.items():
            if isinstance(value, list) and value:
                rope[key] = value[: max(math.ceil(len(value) * small_head / head), 1)]


_CHAT_TEMPLATE = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def write_tiny_copy(policy: PreTrainedConfig, tokenizer_from: Path | None, folder: Path) -> None:
    """Writes a small random policy of the same architecture with a tokenizer.

    Args:
        policy: Configuration of the original policy.
        tokenizer_from: Directory with the policy's tokenizer; None uses a character tokenizer.
        folder: Directory to write to; it is created if necessary.
    """
    config = tiny_config(policy)
    source = tokenizer_from if tokenizer_from is not None else fetch_policy("tiny-llama")
    tokenizer = AutoTokenizer.from_pretrained(source)
    if tokenizer_from is None:
        config.vocab_size, config.max_position_embeddings = len(tokenizer), 8192
        config.pad_token_id, config.bos_token_id, config.eos_token_id = (
            tokenizer.pad_token_id,
            None,
            tokenizer.eos_token_id,
        )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    copy_tokenizer(source, folder)
    if tokenizer_from is None:
        tokenizer.chat_template = _CHAT_TEMPLATE  # prompts with several turns need one
        tokenizer.save_pretrained(folder)
