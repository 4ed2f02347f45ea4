"""From finished sequences to rollouts, and what rollouts tell."""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import replace

from paceline.rollout.api import DistillationTrace, FinishReason, Rollout
from paceline.rollout.sequence import SequenceState


def finished_rollout(sequence: SequenceState, trace: DistillationTrace | None) -> Rollout:
    """What the user gets for a sequence."""
    sequence.stats.seconds = time.perf_counter() - sequence.started
    return Rollout(
        request=sequence.request,
        token_ids=sequence.tokens[sequence.num_prompt :],
        logprobs=sequence.logprobs,
        finish_reason=sequence.finish or FinishReason.FAILED,
        stats=sequence.stats,
        segments=sequence.segments,
        entropies=sequence.entropies if len(sequence.entropies) == len(sequence.logprobs) > 0 else None,
        error=sequence.error,
        trace=trace,
    )


def snapshot(sequence: SequenceState) -> Rollout:
    """What there is of a sequence in flight, for others to branch off from: `Request.resume` takes it."""
    return Rollout(
        request=sequence.request,
        token_ids=sequence.tokens[sequence.num_prompt :],
        logprobs=list(sequence.logprobs),
        finish_reason=FinishReason.PAUSED,
        stats=replace(sequence.stats),
        segments=list(sequence.segments),
        entropies=list(sequence.entropies) if len(sequence.entropies) == len(sequence.logprobs) > 0 else None,
    )


def mean_acceptance_length(rollouts: Iterable[Rollout]) -> float:
    """Committed tokens of one sequence in one target forward, prefills left out: 1 for plain decoding."""
    tokens = steps = 0
    for rollout in rollouts:
        tokens += max(len(rollout.token_ids) - 1, 0)
        steps += rollout.stats.steps
    return tokens / steps if steps else 1.0
