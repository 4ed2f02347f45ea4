"""A strategy, what is learned from running it, and the selector's interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True, slots=True)
class Strategy:
    """What one step runs.

    Attributes:
        drafter: Name of the drafter, or None for plain decoding.
        depth: Draft tokens proposed for each sequence; 0 exactly when ``drafter`` is None.
    """

    drafter: str | None = None
    depth: int = 0

    def __post_init__(self) -> None:
        if (self.drafter is None) != (self.depth == 0) or self.depth < 0:
            raise ValueError(f"strategy {self.drafter}:{self.depth}: name a drafter with a depth of at least 1, or neither")

    def __str__(self) -> str:
        return "plain" if self.drafter is None else f"{self.drafter}:{self.depth}"


PLAIN = Strategy()


@dataclass(frozen=True, slots=True)
class StepFeedback:
    """What a step cost and gave.

    Attributes:
        strategy: What was asked for.
        active: Sequences in the batch.
        context: Longest sequence.
        width: Tokens of each sequence in the target's forward: 1 + the longest draft.
        drafted: Draft tokens of each sequence.
        accepted: How many of them were kept.
        draft_seconds: Time to propose.
        forward_seconds: Time of the target's forward.
        total_seconds: Time of the whole step.
    """

    strategy: Strategy
    active: int
    context: int
    width: int
    drafted: Sequence[int]
    accepted: Sequence[int]
    draft_seconds: float
    forward_seconds: float
    total_seconds: float


class Selector(Protocol):
    """Chooses a strategy before each step from counts and times alone; it never sees a token.

    The choice is made before the step's random numbers are used, so each step's tokens have the target's distribution given the
    past whatever was chosen, and so has the whole sequence.
    """

    def choose(self, active: int, context: int) -> Strategy:
        """The strategy for a batch of ``active`` sequences, the longest of ``context`` tokens."""
        ...

    def record(self, feedback: StepFeedback) -> None:
        """Learns from a finished step."""
        ...

    def drafter_changed(self, name: str) -> None:
        """The drafter ``name`` was added, or has new weights."""
        ...


class FixedSelector:
    """Always the same strategy."""

    def __init__(self, strategy: Strategy = PLAIN) -> None:
        self.strategy = strategy

    def choose(self, active: int, context: int) -> Strategy:
        return self.strategy

    def record(self, feedback: StepFeedback) -> None:
        """Nothing to learn."""

    def drafter_changed(self, name: str) -> None:
        """Nothing to forget."""
