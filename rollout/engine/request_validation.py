"""Which requests can be served."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paceline.rollout.api import FinishReason, Request, Rollout, RolloutStats, SamplingParams
from paceline.rollout.values import error_line, shown, token_list, whole_number


class EngineBusyError(ValueError):
    """The engine is serving another call, or a stream that is not finished."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """What an engine can serve.

    Attributes:
        max_context: Most tokens of prompt and completion together.
        vocab_size: Of the policy.
        decodes_text: Whether it can look for stop strings.
    """

    max_context: int
    vocab_size: int
    decodes_text: bool


def problem_with(request: Any, limits: RequestLimits) -> str | None:
    """Why a request cannot be served, in one line, or None. Whatever is handed in is judged, not raised
    about.
    """
    try:
        if isinstance(request, Request) and isinstance(request.params, SamplingParams):
            request.params.check()  # somebody may have written into it
    except ValueError as error:
        return str(error)
    try:
        return _problem_with(request, limits)
    except Exception as error:  # an object whose own methods fail
        return f"the request cannot be read: {error_line(error)}"


def _problem_with(request: Any, limits: RequestLimits) -> str | None:
    if not isinstance(request, Request):
        return f"the request is {shown(request)}: give a rollout.Request"
    if not isinstance(request.params, SamplingParams):
        return f"params is {shown(request.params)}: give rollout.SamplingParams"
    prompt = token_list(request.prompt_ids)
    if prompt is None:
        return f"prompt_ids is {shown(request.prompt_ids)}: give a list of token ids"
    if not prompt:
        return "the prompt is empty: give at least one token"
    if len(prompt) >= limits.max_context:
        return (
            f"the prompt has {len(prompt)} tokens, the context {limits.max_context}: shorten it or raise "
            f"rollout.max_context"
        )
    if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
        return f"the prompt has a token outside 0..{limits.vocab_size - 1}: was it made by another tokenizer?"
    if whole_number(request.seed) is None:
        return f"seed is {shown(request.seed)}: give a whole number"
    if not _is_key(request.group):
        return (
            f"group is {shown(request.group)}, which is not hashable: give a string, a number or a tuple of "
            f"such"
        )
    if request.params.stop_strings and not limits.decodes_text:
        return "stop_strings need an engine built with decode_text (the tokenizer's decode)"
    return None if request.resume is None else _problem_with_resume(request, prompt, request.resume, limits)


def _is_key(group: Any) -> bool:
    try:
        return {group: True}[group]
    except Exception:
        return False


def _problem_with_resume(
    request: Request, prompt: list[int], earlier: Any, limits: RequestLimits
) -> str | None:
    if not isinstance(earlier, Rollout) or earlier.finish_reason is not FinishReason.PAUSED:
        return "resume is not a paused rollout: give one whose finish_reason is PAUSED"
    if token_list(earlier.request.prompt_ids) != prompt:
        return "resume is a rollout of another prompt: give the prompt it was made for"
    tokens = token_list(earlier.token_ids)
    if tokens is None or any(not 0 <= t < limits.vocab_size for t in tokens):
        return "resume has tokens that are not the policy's: give the rollout as the engine returned it"
    if not _tells_of(earlier, len(tokens)):
        return (
            f"resume has other log-probs, entropies or segments than its {len(tokens)} tokens: give it as "
            f"the engine returned it"
        )
    room = min(limits.max_context - len(prompt), request.params.max_tokens)
    if len(tokens) >= room:
        return (
            f"resume has {len(tokens)} tokens, which max_tokens or the context does not exceed: raise "
            f"max_tokens"
        )
    return None


def _tells_of(earlier: Rollout, count: int) -> bool:
    """Whether everything that the rollout has by token is there for ``count`` of them."""
    numbers: Sequence[Sequence[float]] = [
        earlier.logprobs,
        *([earlier.entropies] if earlier.entropies else []),
    ]
    whole = all(
        len(row) == count and all(isinstance(x, float | int) and not math.isnan(x) for x in row)
        for row in numbers
    )
    return whole and sum(n for _, n in earlier.segments) == count and isinstance(earlier.stats, RolloutStats)


def refused_rollout(request: Request, problem: str) -> Rollout:
    """The rollout of a request that cannot be served."""
    return Rollout(request, [], [], FinishReason.FAILED, RolloutStats(), error=problem)
