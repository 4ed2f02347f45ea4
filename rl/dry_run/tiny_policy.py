"""A small random model of a policy's kind: whether the engine and the updates can run a policy is found out
on it in a moment.
"""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from paceline.rl.dry_run.tiny_copy import tiny_config
from paceline.rl.errors import UserError, one_line
from paceline.rl.generation.policy_engine import check_context, policy_engine
from paceline.rl.learner.log_probs import PolicyLogProbs
from paceline.rl.models.policy_files import check_kind
from paceline.rollout.model.shape import check_family, key_shape

_VOCABULARY, _CONTEXT, _WINDOW = 256, 64, 4
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def check_policy(config: PretrainedConfig, max_context: int) -> str | None:
    """Builds the engine and the packed forward on a small model of a policy's kind, both of which check
    themselves.

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
    """A random float32 model of a config's kind with few layers and small widths, which has run once in
    transformers itself.

    Its windows are so small that a check of a few tokens leaves them. Of a model with images or sound it is
    the language model.

    Args:
        config: Of the policy.
    """
    small = tiny_config(config)
    values = small.to_dict()
    for name in _TOKEN_IDS:
        if values.get(name) is not None:
            setattr(small, name, _within(values[name]))
    if values.get("sliding_window"):
        small.sliding_window = _WINDOW
    small.vocab_size = min(small.vocab_size, _VOCABULARY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    return model


def _within(token: int | list[int]) -> int | list[int]:
    return [t % _VOCABULARY for t in token] if isinstance(token, list) else token % _VOCABULARY
