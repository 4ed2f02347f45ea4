"""Validation of requests before they are scheduled."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from paceline.rollout.api import FinishReason, Request, Rollout, RolloutStats, SamplingParams
from paceline.rollout.values import as_int, as_token_ids, error_line, short_repr


class EngineBusyError(ValueError):
    """Signals that the engine is serving another call, or a stream that is not finished."""


@dataclass(frozen=True, slots=True)
class RequestLimits:
    """States what an engine can serve.

    Attributes:
        max_context: Maximum number of tokens of prompt and completion together.
        vocab_size: Vocabulary size of the policy.
        decodes_text: Whether the engine can look for stop strings.
    """

    max_context: int
    vocab_size: int
    decodes_text: bool


def validate_request(request: Any, limits: RequestLimits) -> str | None:
    """Returns one line saying why a request cannot be served, or None if it can.

    The request may be any object; nothing is raised about it.
    """
    try:
        if isinstance(request, Request) and isinstance(request.params, SamplingParams):
            request.params.check()  # a frozen dataclass can still be changed by object.__setattr__
    except ValueError as error:
        return str(error)
    try:
        return _validate_fields(request, limits)
    except Exception as error:  # the methods of a foreign object may raise anything
        return f"request cannot be read: {error_line(error)}"


def _validate_fields(request: Any, limits: RequestLimits) -> str | None:
    if not isinstance(request, Request):
        return f"request is {short_repr(request)}: pass a paceline.rollout.Request"
    if not isinstance(request.params, SamplingParams):
        return f"params is {short_repr(request.params)}: pass a paceline.rollout.SamplingParams"
    prompt = as_token_ids(request.prompt_ids)
    if prompt is None:
        return f"prompt_ids is {short_repr(request.prompt_ids)}: pass a list of token ids"
    if not prompt:
        return "prompt_ids is empty: pass at least one token id"
    if len(prompt) >= limits.max_context:
        return (
            f"prompt_ids has {len(prompt)} tokens, the context {limits.max_context}: shorten it or raise "
            f"rollout.max_context"
        )
    if min(prompt) < 0 or max(prompt) >= limits.vocab_size:
        return f"prompt_ids has a token outside 0..{limits.vocab_size - 1}: use the policy's own tokenizer"
    if as_int(request.seed) is None:
        return f"seed is {short_repr(request.seed)}: pass an integer"
    if not _is_hashable(request.group):
        return (
            f"group is {short_repr(request.group)}, which is not hashable: pass a string, a number or a tuple"
        )
    if request.params.stop_strings and not limits.decodes_text:
        return "stop_strings needs text: build the engine with decode_text (the tokenizer's decode)"
    return None if request.resume is None else _validate_resume(request, prompt, request.resume, limits)


def _is_hashable(group: Any) -> bool:
    """Returns whether a group can be a dictionary key."""
    try:
        return {group: True}[group]
    except Exception:
        return False


def _validate_resume(request: Request, prompt: list[int], earlier: Any, limits: RequestLimits) -> str | None:
    if not isinstance(earlier, Rollout) or earlier.finish_reason is not FinishReason.PAUSED:
        return "resume is not a paused rollout: pass one whose finish_reason is PAUSED"
    if as_token_ids(earlier.request.prompt_ids) != prompt:
        return "resume is a rollout of another prompt: pass its own prompt as prompt_ids"
    tokens = as_token_ids(earlier.token_ids)
    if tokens is None or any(not 0 <= t < limits.vocab_size for t in tokens):
        return "resume has tokens outside the policy's vocabulary: pass the rollout as the engine returned it"
    if not _covers_tokens(earlier, len(tokens)):
        return (
            f"resume has log-probs, entropies or segments that do not match its {len(tokens)} tokens: "
            f"pass it as the engine returned it"
        )
    room = min(limits.max_context - len(prompt), request.params.max_tokens)
    if len(tokens) >= room:
        return (
            f"resume has {len(tokens)} tokens, which already reaches max_tokens or the context: "
            f"raise max_tokens or max_context"
        )
    return None


def _covers_tokens(earlier: Rollout, count: int) -> bool:
    """Returns whether the rollout's per-token records all cover exactly ``count`` tokens."""
    rows: Sequence[Sequence[float]] = [
        earlier.logprobs,
        *([earlier.entropies] if earlier.entropies else []),
    ]
    complete = all(
        len(row) == count and all(isinstance(x, float | int) and not math.isnan(x) for x in row)
        for row in rows
    )
    return (
        complete and sum(n for _, n in earlier.segments) == count and isinstance(earlier.stats, RolloutStats)
    )


def failed_rollout(request: Request, problem: str) -> Rollout:
    """Returns the FAILED rollout of a request that cannot be served."""
    return Rollout(request, [], [], FinishReason.FAILED, RolloutStats(), error=problem)
