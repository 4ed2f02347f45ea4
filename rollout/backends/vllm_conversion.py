"""Conversion of requests to vLLM's parameters, and of its results to rollouts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from paceline.rollout.api import FinishReason, Request, Rollout, RolloutStats
from paceline.rollout.backends.vllm_plain import MARK

_NUM_SEEDS = 2**32  # seeds are sent modulo this
# A server fills parameters that a request leaves out from the policy's generation_config.json, which has
# penalties for many instruct models.
_NEUTRAL_PARAMS = {
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "presence_penalty": 0.0,
    "frequency_penalty": 0.0,
    "min_tokens": 0,
}


def sampling(request: Request) -> dict[str, Any]:
    """Returns keyword arguments of vLLM's `SamplingParams`, which are also fields of its completion endpoint.

    A completion ends only at the request's own stop tokens, and every parameter that would change the
    policy's distribution is sent with its neutral value. The log-probs are those of the processed
    distribution, provided that vLLM was started with ``logprobs_mode="processed_logprobs"``.
    """
    requested = request.params
    params: dict[str, Any] = {
        "temperature": requested.temperature,
        "top_k": requested.top_k,
        "top_p": requested.top_p,
        "max_tokens": requested.max_tokens,
        "stop_token_ids": list(requested.stop_token_ids),
        "seed": request.seed % _NUM_SEEDS,
        "logprobs": 0,
        "ignore_eos": True,
        **_NEUTRAL_PARAMS,
    }
    if requested.stop_strings:  # they may be special tokens, and vLLM searches for them in its output text
        params |= {"stop": list(requested.stop_strings), "skip_special_tokens": False}
    return params


def marked_plain(number: int) -> dict[str, Any]:
    """Returns fields of the completion endpoint that ask for decoding without drafts.

    The cache salt keeps prompts of this comparison, and their keys and values, apart from all others.

    Args:
        number: Number of the comparison.
    """
    return {"vllm_xargs": {MARK: 1}, "cache_salt": f"paceline-plain-{number}"}


def finished(
    request: Request,
    tokens: Sequence[int],
    logprobs: Sequence[float],
    reason: str | None,
    stats: RolloutStats,
    version: int,
) -> Rollout:
    """Builds a rollout from vLLM's result; as in the engine, log-probs that are not finite make it failed."""
    finish_reason = FinishReason.LENGTH if reason == "length" else FinishReason.STOP
    error = None
    if not all(math.isfinite(x) for x in logprobs):
        finish_reason = FinishReason.FAILED
        error = "vLLM's log-probs are not finite (NaN or infinite): check the last update's gradient norm"
    return Rollout(
        request,
        list(tokens),
        list(logprobs),
        finish_reason,
        stats,
        [(version, len(tokens))] if tokens else [],
        None,
        error,
    )


def rejected(request: Request, error: Exception, version: int) -> Rollout:
    """Builds the failed rollout of a request that vLLM rejected."""
    line = " ".join(str(error).split())[:300]
    return Rollout(request, [], [], FinishReason.FAILED, RolloutStats(), [], None, f"vLLM: {line}")
