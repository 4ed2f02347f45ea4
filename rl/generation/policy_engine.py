"""Builds the engine for a policy; errors name the recipe's key."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from paceline.rl.errors import UserError
from paceline.rollout import RolloutEngine
from paceline.rollout.text_limits import text_limit


def check_context(policy: PreTrainedModel, max_context: int) -> None:
    """Raises for a context that is longer than a policy computes exactly.

    Args:
        policy: A causal LM.
        max_context: The largest number of tokens of prompt and completion together.

    Raises:
        UserError: when the context is too long; it names the largest possible value.
    """
    limit = text_limit(policy)
    if limit is not None and max_context > limit.tokens:
        name = type(policy).__name__
        raise UserError(
            f"rollout.max_context is {max_context}: {name} {limit.reason} past {limit.tokens} tokens; write "
            "at most that"
        )


def policy_engine(policy: PreTrainedModel, *, max_context: int, **options: Any) -> RolloutEngine:
    """Builds a `RolloutEngine` and turns its errors into `UserError`.

    Args:
        policy: The trainer's unwrapped causal LM.
        max_context: The largest number of tokens of prompt and completion together.
        **options: The engine's other arguments.

    Raises:
        UserError: for a policy that the engine cannot run, a context longer than the policy computes exactly,
            or too little memory.
    """
    try:
        check_context(policy, max_context)
        return RolloutEngine(policy, max_context=max_context, **options)
    except MemoryError as error:
        raise UserError(str(error)) from None
    except ValueError as error:
        raise UserError(f"policy.model: {error}") from None
