"""A small random model of a policy's kind: whether the engine and the updates can run a policy is found out on it in a moment."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from rl.errors import UserError
from rl.log_probs import PolicyLogProbs
from rl.policy_engine import check_context, policy_engine
from rl.policy_files import check_kind, one_line
from rollout.model_shape import check_family, key_shape

_VOCABULARY, _CONTEXT, _WINDOW, _EXPERTS = 256, 64, 4, 4
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")
_AT_MOST = {
    "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32, "intermediate_size_mlp": 64, "sliding_window": _WINDOW,
    "num_experts": _EXPERTS, "num_local_experts": _EXPERTS, "n_routed_experts": _EXPERTS, "moe_num_experts": _EXPERTS,
    "num_experts_per_tok": 2, "moe_k": 2, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
}  # fmt: skip


def check_policy(config: PretrainedConfig, max_context: int) -> str | None:
    """Builds the engine and the packed forward on a small model of a policy's kind, both of which check themselves.

    Args:
        config: Of the policy.
        max_context: Of the recipe.

    Returns:
        Why nothing could be tried, in one line; None where it was.

    Raises:
        UserError: when the policy cannot be decoded or trained.
    """
    check_kind(config.to_dict(), "policy.model")
    try:
        policy = tiny_policy(config)
    except Exception as error:  # configs of an unforeseen form: the run itself checks the whole model
        _check_whole(config)
        return f"no small model of model_type {config.model_type} could be made to try it ({one_line(error)})"
    check_context(policy, max_context)
    policy_engine(policy, dtype=torch.float32, max_slots=2, max_context=min(_CONTEXT, max_context))
    PolicyLogProbs(policy)
    return None


def _check_whole(config: PretrainedConfig) -> None:
    """What can be told of a policy without weights."""
    try:
        with torch.device("meta"):
            whole = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # as in `check_policy`
        raise UserError(f"policy.model: no model of this config can be made ({one_line(error)})") from None
    try:
        check_family(whole)
        key_shape(config)
    except ValueError as error:
        raise UserError(f"policy.model: {error}") from None


def tiny_policy(config: PretrainedConfig) -> PreTrainedModel:
    """A random float32 model of a config's kind with few layers and small widths, which has run once in transformers itself.

    Layers of every kind that the policy has are kept, and its head dimension, on which tables of rotary factors depend; windows
    are made so small that a check of a few tokens leaves them. Of a model with images or sound it is the language model.

    Args:
        config: Of the policy.
    """
    text = config.get_text_config()
    small = copy.deepcopy(text if text.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES else config)
    shrink(small.get_text_config())
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    return model


def shrink(text: PretrainedConfig) -> None:
    """Makes a text config small in place, see `tiny_policy`."""
    keys = key_shape(text)
    heads = min(text.num_attention_heads, 2 if keys.head_dim > 64 else 4)
    kv_heads = max(heads * keys.kv_heads // text.num_attention_heads, 1)
    wide, hidden = text.hidden_size, heads * keys.head_dim
    values = text.to_dict()
    kinds = values.get("layer_types") or [None] * text.num_hidden_layers
    layers = min(max(kinds.index(kind) for kind in set(kinds)) + 2, len(kinds))
    changed: dict[str, Any] = {
        name: value[:layers] for name, value in values.items() if isinstance(value, list) and len(value) == len(kinds)
    }
    changed |= {name: min(values[name], most) for name, most in _AT_MOST.items() if isinstance(values.get(name), int)}
    changed |= {name: _within(values[name]) for name in _TOKEN_IDS if values.get(name) is not None}
    if "word_embed_proj_dim" in values:
        changed["word_embed_proj_dim"] = hidden if values["word_embed_proj_dim"] == wide else hidden // 2
    for name in ("num_key_value_heads", "num_kv_heads"):
        if values.get(name) is not None:
            changed[name] = kv_heads
    for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size"):
        if values.get(name) is not None:
            changed[name] = 2 * hidden
    changed |= {"num_hidden_layers": layers, "num_attention_heads": heads, "hidden_size": hidden}
    changed["vocab_size"] = min(text.vocab_size, _VOCABULARY)
    for name, value in changed.items():
        setattr(text, name, value)


def _within(token: int | list[int]) -> int | list[int]:
    return [t % _VOCABULARY for t in token] if isinstance(token, list) else token % _VOCABULARY
