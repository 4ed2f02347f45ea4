"""Requests and rollouts in vLLM's terms."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from paceline.rollout.api import FinishReason, Request, Rollout, RolloutStats

_SEEDS = 2**32
# A server fills what a request leaves out from the policy's generation_config.json, which for many instruct
# models has penalties.
_NEUTRAL = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
}


def sampling(request: Request) -> dict[str, Any]:
    """Keyword arguments of vLLM's `SamplingParams`, which are also fields of its completion endpoint.

    A completion ends at the request's own stop tokens alone, and every parameter that would change the
    policy's distribution is sent with its neutral value; its log-probs are of the processed distribution
    where vLLM was started with ``logprobs_mode="processed_logprobs"``.
    """
    p = request.params
    found: dict[str, Any] = {
        "temperature": p.temperature,
        "top_k": p.top_k,
        "top_p": p.top_p,
        "max_tokens": p.max_tokens,
        "stop_token_ids": list(p.stop_token_ids),
        "seed": request.seed % _SEEDS,
        "logprobs": 0,
        "ignore_eos": True,
        **_NEUTRAL,
    }
    if p.stop_strings:  # which may be special tokens: vLLM looks for them in the text that it writes
        found |= {"stop": list(p.stop_strings), "skip_special_tokens": False}
    return found


def finished(
    request: Request,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    reason: str | None,
    stats: RolloutStats,
    version: int,
) -> Rollout:
    """A rollout from what vLLM gave; log-probs that are not finite make it a failed one, as in the engine."""
    ended = FinishReason.LENGTH if reason == "length" else FinishReason.STOP
    error = None
    if not all(math.isfinite(x) for x in logprobs):
        ended, error = (
            FinishReason.FAILED,
            "vLLM's log-probs are not finite (NaN or infinite): check the last update's gradient norm",
        )
    return Rollout(
        request,
        list(tokens),
        list(logprobs),
        ended,
        stats,
        [(version, len(tokens))] if tokens else [],
        None,
        error,
    )


def refused(request: Request, error: Exception, version: int) -> Rollout:
    """A rollout of a request that vLLM would not take."""
    line = " ".join(str(error).split())[:300]
    return Rollout(request, [], [], FinishReason.FAILED, RolloutStats(), [], None, f"vLLM: {line}")
