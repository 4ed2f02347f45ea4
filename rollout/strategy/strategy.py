"""A strategy, the record of a step that ran one, and the interface of selectors."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from paceline.rollout.trees.draft_tree import MAX_NODES


@dataclass(frozen=True, slots=True)
class Strategy:
    """What one decode step runs.

    Attributes:
        drafter: Name of the drafter, or None for plain decoding.
        depth: Number of draft levels; 0 exactly when ``drafter`` is None.
        width: Branches of a level; 1 for a chain.
        nodes: Draft tokens of each sequence to verify; 0 stands for ``depth`` × ``width``, and for a chain it
            is always ``depth``.
    """

    drafter: str | None = None
    depth: int = 0
    width: int = 1
    nodes: int = 0

    def __post_init__(self) -> None:
        if (self.drafter is None) != (self.depth == 0) or self.depth < 0:
            raise ValueError(
                f"strategy {self.drafter}:{self.depth}: write a drafter and a depth of at least 1, or neither"
            )
        if self.width < 1:
            raise ValueError(f"strategy {self.drafter}: width is {self.width}: write at least 1")
        if self.width == 1 or self.nodes == 0:
            object.__setattr__(self, "nodes", self.depth * self.width)
        if self.depth and self.nodes < self.depth:
            raise ValueError(
                f"strategy {self}: {self.nodes} nodes cannot reach depth {self.depth}: write at least "
                f"{self.depth} nodes"
            )
        if self.width * self.depth > MAX_NODES or self.nodes > MAX_NODES:
            raise ValueError(
                f"strategy {self}: width × depth and nodes must not exceed {MAX_NODES}: write less"
            )

    def __str__(self) -> str:
        if self.drafter is None:
            return "plain"
        return f"{self.drafter}:{self.depth}" + (f"x{self.width}/{self.nodes}" if self.width > 1 else "")

    def with_nodes(self, nodes: int, depth: int) -> Strategy:
        """Returns the same kind of draft with ``nodes`` draft tokens.

        A chain becomes as deep as that, but no deeper than ``depth``; a tree keeps its depth and width.
        """
        if self.width == 1:
            return Strategy(self.drafter, min(nodes, depth))
        return replace(self, nodes=max(nodes, self.depth))

    @classmethod
    def parse(cls, text: str) -> Strategy:
        """Parses what ``str`` of a strategy writes.

        The forms are ``plain``, ``<drafter>:<depth>`` for a chain and ``<drafter>:<depth>x<width>/<nodes>``
        for a tree.

        Raises:
            ValueError: The text has another form.
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
    """What a step cost and what it gained.

    Attributes:
        strategy: Strategy that was chosen.
        active: Number of sequences in the batch.
        context: Tokens of the longest sequence.
        drafted: Number of draft tokens of each sequence.
        accepted: Number of accepted draft tokens of each sequence.
        committed: Number of tokens committed by all sequences together.
        draft_seconds: Seconds of drafting.
        forward_seconds: Seconds of the target's forward.
        total_seconds: Seconds of the whole step.
        caught_up: Whether ``draft_seconds`` includes reading what earlier steps had left unread.
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
    caught_up: bool = False


class Selector(Protocol):
    """Chooses a strategy before each step from counts and times alone; it never sees a token.

    The choice is made before the step's random numbers are used. So each step's tokens have the target's
    distribution given the past, whatever was chosen, and so has the whole sequence.
    """

    def choose(self, active: int, context: int) -> Strategy:
        """Returns the strategy for ``active`` sequences, the longest of which has ``context`` tokens."""
        ...

    def strategies(self) -> Sequence[Strategy]:
        """Returns all strategies that may be chosen."""
        ...

    def record(self, feedback: StepFeedback) -> None:
        """Learns from a finished step."""
        ...

    def most_saved(self, drafter: str) -> float:
        """Returns the share of the time so far that good drafts of ``drafter`` would save; 1 if unknown."""
        ...

    def drafter_changed(self, name: str) -> None:
        """Notes that the drafter ``name`` was added or has new weights."""
        ...

    def drafter_lost(self, name: str) -> None:
        """Notes that the drafter ``name`` was removed: none of its strategies may be chosen any more."""
        ...

    def state(self) -> dict[str, Any] | None:
        """Returns everything learned, as JSON; None if the selector learns nothing."""
        ...

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from what `state` returned.

        Raises:
            ValueError: The argument is not such a state.
        """
        ...


class FixedSelector:
    """Always chooses the same strategy."""

    def __init__(self, strategy: Strategy = PLAIN) -> None:
        self.strategy = strategy

    def choose(self, active: int, context: int) -> Strategy:
        """Returns the fixed strategy."""
        return self.strategy

    def strategies(self) -> Sequence[Strategy]:
        """Returns the fixed strategy as the only one."""
        return (self.strategy,)

    def record(self, feedback: StepFeedback) -> None:
        """Does nothing: a fixed strategy learns nothing."""

    def most_saved(self, drafter: str) -> float:
        """Returns 1, because nothing is measured."""
        return 1.0

    def drafter_changed(self, name: str) -> None:
        """Does nothing: nothing was learned about the drafter."""

    def drafter_lost(self, name: str) -> None:
        """Switches to plain decoding if the fixed strategy used this drafter."""
        if self.strategy.drafter == name:
            self.strategy = PLAIN

    def state(self) -> dict[str, Any] | None:
        """Returns None, because nothing is learned."""
        return None

    def load_state(self, state: dict[str, Any]) -> None:
        """Does nothing: what another selector learned does not apply."""
