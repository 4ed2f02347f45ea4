"""State of one sequence while it is decoded."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from rollout.api import FinishReason, Request, RolloutStats


@dataclass(slots=True, eq=False)
class SequenceState:
    """A request in flight. The target's cache holds every token but the last one, which the next forward reads.

    Attributes:
        request: What to produce.
        index: Position of the request in the caller's list.
        limit: Most tokens of prompt and completion together.
        tokens: Prompt and what is committed so far.
        num_prompt: Length of the prompt.
        logprobs: One for each committed token.
        stats: Filled as it goes.
        finish: Why it ended, once it has.
    """

    request: Request
    index: int
    limit: int
    tokens: list[int] = field(init=False)
    num_prompt: int = field(init=False)
    logprobs: list[float] = field(default_factory=list)
    stats: RolloutStats = field(default_factory=RolloutStats)
    finish: FinishReason | None = None
    started: float = field(default_factory=time.perf_counter)

    def __post_init__(self) -> None:
        self.tokens = list(self.request.prompt_ids)
        self.num_prompt = len(self.tokens)

    @property
    def remaining(self) -> int:
        """Tokens that may still be produced."""
        return self.limit - len(self.tokens)
