"""Conversion of sequence states to the rollouts that the caller receives."""

from __future__ import annotations

import time
from dataclasses import replace

from paceline.rollout.api import DistillationTrace, FinishReason, Rollout
from paceline.rollout.sequence import SequenceState


def finished_rollout(sequence: SequenceState, trace: DistillationTrace | None) -> Rollout:
    """Returns the rollout of a finished sequence and records its wall time."""
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
    """Returns a copy of a sequence in flight as a paused rollout, which `Request.resume` accepts."""
    return Rollout(
        request=sequence.request,
        token_ids=sequence.tokens[sequence.num_prompt :],
        logprobs=list(sequence.logprobs),
        finish_reason=FinishReason.PAUSED,
        stats=replace(sequence.stats),
        segments=list(sequence.segments),
        entropies=list(sequence.entropies) if len(sequence.entropies) == len(sequence.logprobs) > 0 else None,
    )
