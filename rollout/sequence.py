"""State of one sequence while it is decoded."""

from __future__ import annotations

import operator
import time
from collections.abc import Iterable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from paceline.rollout.api import FinishReason, Request, RolloutStats
from paceline.rollout.counter_rng import reduced_seed
from paceline.rollout.values import as_token_ids


@dataclass(frozen=True, slots=True)
class Rejection:
    """Records a draft token that verification rejected and the target's hidden state after it.

    Attributes:
        position: Position of the draft token in the text, where the sequence now has another token.
        token: Id of the draft token.
        final: Input of the target's output head after the draft token, [hidden].
    """

    position: int
    token: int
    final: torch.Tensor


@dataclass(slots=True, eq=False)
class SequenceState:
    """Holds a request in flight.

    The target's cache holds every token but the last one, which the next forward reads.

    Attributes:
        request: Request to serve.
        index: Position of the request in the caller's list.
        limit: Maximum number of tokens, prompt and completion together.
        segment: Maximum number of tokens to commit before the sequence is paused; None for no limit.
        mark: Number of tokens between points where the caller may branch off other sequences; None for no
            such points.
        seed: Seed of the request modulo 2^64.
        tokens: Prompt and committed tokens.
        num_prompt: Length of the prompt in tokens.
        counted_from: Number of tokens that do not count towards ``segment`` and ``mark``: those present at
            the start of the call, or at the last mark.
        logprobs: Log-prob of each committed token.
        stats: Work done so far.
        finish: Finish reason; None while the sequence is in flight.
        error: One-line error message if the sequence failed.
        predicted: Expected number of completion tokens; None if unknown.
        segments: Pairs (policy version, number of tokens committed under it), oldest first.
        rejections: Draft tokens that verification rejected, if the engine collects them.
        entropies: Entropy of each committed token's distribution, if the engine collects it.
        started: Time of submission, in seconds of `time.perf_counter`.
    """

    request: Request
    index: int
    limit: int
    segment: int | None = None
    mark: int | None = None
    seed: int = field(init=False)
    tokens: list[int] = field(init=False)
    num_prompt: int = field(init=False)
    counted_from: int = field(init=False)
    logprobs: list[float] = field(default_factory=list)
    stats: RolloutStats = field(default_factory=RolloutStats)
    finish: FinishReason | None = None
    error: str | None = None
    predicted: float | None = None
    segments: list[tuple[int, int]] = field(default_factory=list)
    rejections: list[Rejection] = field(default_factory=list)
    entropies: list[float] = field(default_factory=list)
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.seed = reduced_seed(operator.index(self.request.seed))
        self.tokens = as_token_ids(self.request.prompt_ids) or []
        self.num_prompt = len(self.tokens)
        earlier = self.request.resume
        if earlier is not None:
            self.tokens += earlier.token_ids
            self.logprobs += earlier.logprobs
            self.segments += earlier.segments
            self.entropies += earlier.entropies or []
            self.stats = replace(earlier.stats)
        self.counted_from = len(self.tokens)

    @property
    def remaining(self) -> int:
        """The number of tokens that may still be generated."""
        return self.limit - len(self.tokens)

    @property
    def segment_finished(self) -> bool:
        """Whether the sequence has committed as many tokens as this call allows."""
        return self.segment is not None and len(self.tokens) - self.counted_from >= self.segment

    def pass_mark(self) -> bool:
        """Returns whether the sequence has reached its next mark, and if so counts from here to the next."""
        if self.mark is None or len(self.tokens) - self.counted_from < self.mark:
            return False
        self.counted_from = len(self.tokens)
        return True

    @property
    def expected_left(self) -> float:
        """The number of tokens still expected; without a prediction, as many as may still be generated."""
        if self.predicted is None:
            return float(self.remaining)
        return min(max(self.predicted - (len(self.tokens) - self.num_prompt), 0.0), self.remaining)

    def append(self, token: int, logprob: float, version: int) -> None:
        """Commits one token that was sampled under policy ``version``."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.segments and self.segments[-1][0] == version:
            self.segments[-1] = version, self.segments[-1][1] + 1
        else:
            self.segments.append((version, 1))


def seeds_of(sequences: Iterable[SequenceState]) -> np.ndarray:
    """Returns the seed of each sequence, uint64 [B]."""
    return np.array([s.seed for s in sequences], dtype=np.uint64)
