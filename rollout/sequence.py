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
from paceline.rollout.values import token_list


@dataclass(frozen=True, slots=True)
class Rejection:
    """A draft token that verification rejected, and what the target would have said after it.

    Attributes:
        position: Its position in the text, where another token stands now.
        token: Its id.
        final: [hidden], the input of the target's output head after it.
    """

    position: int
    token: int
    final: torch.Tensor


@dataclass(slots=True, eq=False)
class SequenceState:
    """A request in flight. The target's cache holds every token but the last one, which the next forward
    reads.

    Attributes:
        request: What to produce.
        index: Position of the request in the caller's list.
        limit: Most tokens of prompt and completion together.
        segment: Most tokens to commit before it is paused; None for no such limit.
        mark: Tokens between two places where the caller may let others branch off; None for no such places.
        seed: The request's, modulo 2^64.
        tokens: Prompt and what is committed so far.
        num_prompt: Length of the prompt.
        began: Tokens that were there at first, of an earlier call's too, or at the last mark.
        logprobs: One for each committed token.
        stats: Filled as it goes.
        finish: Why it ended, once it has.
        error: One line, where it failed.
        predicted: Expected completion tokens, where something is known.
        segments: (policy version, tokens committed under it), oldest first.
        rejections: Draft tokens that verification rejected, where that is collected.
        entropies: One for each committed token, where that is collected.
    """

    request: Request
    index: int
    limit: int
    segment: int | None = None
    mark: int | None = None
    seed: int = field(init=False)
    tokens: list[int] = field(init=False)
    num_prompt: int = field(init=False)
    began: int = field(init=False)
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
        self.tokens = token_list(self.request.prompt_ids) or []
        self.num_prompt = len(self.tokens)
        earlier = self.request.resume
        if earlier is not None:
            self.tokens += earlier.token_ids
            self.logprobs += earlier.logprobs
            self.segments += earlier.segments
            self.entropies += earlier.entropies or []
            self.stats = replace(earlier.stats)
        self.began = len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens that may still be produced."""
        return self.limit - len(self.tokens)

    @property
    def segment_over(self) -> bool:
        """Whether it has committed what it may in this call."""
        return self.segment is not None and len(self.tokens) - self.began >= self.segment

    def at_mark(self) -> bool:
        """Whether it has come to the next mark; if so, it is counted from there."""
        if self.mark is None or len(self.tokens) - self.began < self.mark:
            return False
        self.began = len(self.tokens)
        return True

    @property
    def expected_left(self) -> float:
        """Tokens that are still expected, as far as anything is known."""
        if self.predicted is None:
            return float(self.remaining)
        return min(max(self.predicted - (len(self.tokens) - self.num_prompt), 0.0), self.remaining)

    def append(self, token: int, logprob: float, version: int) -> None:
        """Commits one token, drawn under policy ``version``."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if self.segments and self.segments[-1][0] == version:
            self.segments[-1] = version, self.segments[-1][1] + 1
        else:
            self.segments.append((version, 1))


def seeds_of(sequences: Iterable[SequenceState]) -> np.ndarray:
    """uint64, one a sequence."""
    return np.array([s.seed for s in sequences], dtype=np.uint64)
