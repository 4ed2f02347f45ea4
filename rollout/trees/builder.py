"""The interface of a tree builder, as the registry `paceline.rollout.trees.TREES` has it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from paceline.rollout.trees.draft_tree import DraftTree
from paceline.rollout.trees.expander import Expander, TreeLimits, Uniform


@dataclass(frozen=True, slots=True)
class TreeOptions:
    """What a builder may need beside the expander and the limits; each builder reads its own part.

    Attributes:
        uniform: Random numbers of the step, for drawing tokens.
        replacement: Whether siblings are drawn independently of each other.
        gain: Minimum expected tokens that a further level must add.
    """

    uniform: Uniform
    replacement: bool
    gain: float


@dataclass(frozen=True, slots=True)
class TreeBuilder:
    """A function that builds the trees of a batch, and the ways of choosing tokens that it supports.

    Attributes:
        grow: Builds a draft with ``parents``, given the drafter's model, the limits and the options.
        draws: Supported values of `DraftRules.draw`: ``likeliest``, ``replacement``, ``without_replacement``.
        fixed_work: Whether a draft takes the same operators on the same shapes whatever its tokens are, and
            none that the host waits for.
    """

    grow: Callable[[Expander, TreeLimits, TreeOptions], DraftTree]
    draws: tuple[str, ...]
    fixed_work: bool = False
