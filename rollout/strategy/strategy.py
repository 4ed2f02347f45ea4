"""A strategy, what is learned from running it, and the selector's interface."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from paceline.rollout.trees.draft_tree import MAX_NODES


@dataclass(frozen=True, slots=True)
class Strategy:
    """What one step runs.

    Attributes:
        drafter: Name of the drafter, or None for plain decoding.
        depth: Levels of the draft; 0 exactly when ``drafter`` is None.
        width: Branches of a level; 1 for a chain.
        nodes: Draft tokens of each sequence to verify; ``depth`` for a chain, which is what 0 stands for.
    """

    drafter: str | None = None
    depth: int = 0
    width: int = 1
    nodes: int = 0

    def __post_init__(self) -> None:
        if (self.drafter is None) != (self.depth == 0) or self.depth < 0:
            raise ValueError(
                f"strategy {self.drafter}:{self.depth}: name a drafter with a depth of at least 1, or neither"
            )
        if self.width < 1:
            raise ValueError(f"strategy {self.drafter}: width is {self.width}, write at least 1")
        if self.width == 1 or self.nodes == 0:
            object.__setattr__(self, "nodes", self.depth * self.width)
        if self.depth and self.nodes < self.depth:
            raise ValueError(f"strategy {self}: {self.nodes} nodes cannot be {self.depth} deep")
        if self.width * self.depth > MAX_NODES or self.nodes > MAX_NODES:
            raise ValueError(f"strategy {self}: width × depth and nodes are at most {MAX_NODES}")

    def __str__(self) -> str:
        if self.drafter is None:
            return "plain"
        return f"{self.drafter}:{self.depth}" + (f"x{self.width}/{self.nodes}" if self.width > 1 else "")

    def with_nodes(self, nodes: int, depth: int) -> Strategy:
        """The same kind of draft with that many nodes; a chain is as deep, and no deeper than ``depth``."""
        if self.width == 1:
            return Strategy(self.drafter, min(nodes, depth))
        return replace(self, nodes=max(nodes, self.depth))

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Reads what ``str`` writes: ``plain``, ``<drafter>:<depth>`` for a chain,
        ``<drafter>:<depth>x<width>/<nodes>`` for a tree.

        Raises:
            ValueError: for anything else.
        """
        if text == "plain":
            return cls()
        match = re.fullmatch(r"([a-z0-9_]+):(\d+)(?:x(\d+)/(\d+))?", text)
        if match is None:
            raise ValueError(
                f"strategy {text!r}: write plain, <drafter>:<depth> or <drafter>:<depth>x<width>/<nodes>, "
                "for example eagle3:5x4/12"
            )
        name, depth, width, nodes = match.groups()
        return cls(name, int(depth), int(width or 1), int(nodes or 0))


PLAIN = Strategy()


@dataclass(frozen=True, slots=True)
class StepFeedback:
    """What a step cost and gave.

    Attributes:
        strategy: What was asked for.
        active: Sequences in the batch.
        context: Longest sequence.
        drafted: Draft tokens of each sequence.
        accepted: How many of them were kept.
        committed: Tokens of the step, all sequences.
        draft_seconds: Time to propose.
        forward_seconds: Time of the target's forward.
        total_seconds: Time of the whole step.
    """

    strategy: Strategy
    active: int
    context: int
    drafted: Sequence[int]
    accepted: Sequence[int]
    committed: int
    draft_seconds: float
    forward_seconds: float
    total_seconds: float


class Selector(Protocol):
    """Chooses a strategy before each step from counts and times alone; it never sees a token.

    The choice is made before the step's random numbers are used, so each step's tokens have the target's
    distribution given the past whatever was chosen, and so has the whole sequence.
    """

    def choose(self, active: int, context: int) -> Strategy:
        """The strategy for a batch of ``active`` sequences, the longest of ``context`` tokens."""
        ...

    def strategies(self) -> Sequence[Strategy]:
        """All that it may choose."""
        ...

    def record(self, feedback: StepFeedback) -> None:
        """Learns from a finished step."""
        ...

    def drafter_changed(self, name: str) -> None:
        """The drafter ``name`` was added, or has new weights."""
        ...

    def drafter_lost(self, name: str) -> None:
        """The drafter ``name`` is no longer there: none of its strategies may be chosen."""
        ...

    def state(self) -> dict[str, Any] | None:
        """All that was learned, as JSON; None where nothing is."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Goes on from what `state` gave; ValueError for something else."""
        ...


class FixedSelector:
    """Always the same strategy."""

    def __init__(self, strategy: Strategy = PLAIN) -> None:
        self.strategy = strategy

    def choose(self, active: int, context: int) -> Strategy:
        return self.strategy

    def strategies(self) -> Sequence[Strategy]:
        return (self.strategy,)

    def record(self, feedback: StepFeedback) -> None:
        """Nothing to learn."""

    def drafter_changed(self, name: str) -> None:
        """Nothing to forget."""

    def drafter_lost(self, name: str) -> None:
        """Plain decoding from now on, where it was this drafter's strategy."""
        if self.strategy.drafter == name:
            self.strategy = PLAIN

    def state(self) -> dict[str, Any] | None:
        """Nothing was learned."""
        return None

    def load_state(self, state: dict[str, Any]) -> None:
        """What another selector had learned is of no use here."""
