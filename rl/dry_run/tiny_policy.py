"""Checks on a small random model of the same architecture whether a policy can be decoded and trained."""

from __future__ import annotations

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from paceline.rl.dry_run.tiny_copy import tiny_config
from paceline.rl.errors import UserError, one_line
from paceline.rl.generation.policy_engine import check_context, policy_engine
from paceline.rl.learner.log_probs import PolicyLogProbs
from paceline.rl.models.policy_files import check_kind
from paceline.rollout.model.shape import check_family, key_shape

_VOCABULARY, _CONTEXT = 256, 64
_WINDOW = 4  # tokens; so small that a check of a few tokens goes beyond it
_TOKEN_IDS = ("pad_token_id", "bos_token_id", "eos_token_id")


def check_policy(config: PretrainedConfig, max_context: int) -> str | None:
    """Builds the engine and the packed forward on a small version of a policy; both check themselves.

    Args:
        config: Configuration of the policy.
        max_context: The recipe's ``rollout.max_context``.

    Returns:
        Why no small model could be built, in one line; None if the check ran.

    Raises:
        UserError: If the policy cannot be decoded or trained.
    """
    check_kind(config.to_dict(), "policy.model")
    try:
        policy = tiny_policy(config)
    except Exception as error:  # a config of unforeseen form: the run itself checks the full model
        _check_full_size(config)
        return f"no small model of model_type {config.model_type} could be made to try it ({one_line(error)})"
    check_context(policy, max_context)
    policy_engine(policy, dtype=torch.float32, max_slots=2, max_context=min(_CONTEXT, max_context))
    PolicyLogProbs(policy)
    return None


def _check_full_size(config: PretrainedConfig) -> None:
    """Checks what can be checked on the full-size policy without weights.

    Raises:
        UserError: If no model can be built from the config, or the engine does not support its family.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # model classes raise many types
        raise UserError(
            f"policy.model: no model can be built from its config ({one_line(error)}): choose another"
        ) from None
    try:
        check_family(model)
        key_shape(config)
    except ValueError as error:
        raise UserError(f"policy.model: {error}") from None


def tiny_policy(config: PretrainedConfig) -> PreTrainedModel:
    """Builds a random float32 model of a config's architecture with few layers and small widths.

    The model has run once in transformers itself. Sliding windows are so small that a check of a few tokens
    goes beyond them. For a model with images or sound, this builds its language model.

    Args:
        config: Configuration of the policy.
    """
    small = tiny_config(config)
    values = small.to_dict()
    for name in _TOKEN_IDS:
        if values.get(name) is not None:
            setattr(small, name, _within_vocabulary(values[name]))
    if values.get("sliding_window"):
        small.sliding_window = _WINDOW
    small.vocab_size = min(small.vocab_size, _VOCABULARY)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(small, dtype=torch.float32).eval()
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=False)
    return model


def _within_vocabulary(token: int | list[int]) -> int | list[int]:
    return [t % _VOCABULARY for t in token] if isinstance(token, list) else token % _VOCABULARY
