"""From a model-based drafter's distributions to a draft: which tree, drawn how, ended when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from paceline.rollout.counter_rng import Stream, step_uniforms
from paceline.rollout.drafters.base import VerifiedStep
from paceline.rollout.sequence import SequenceState, seeds_of
from paceline.rollout.strategy.stop_policy import STOP_POLICIES, LearnedThreshold
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import DraftKind, DraftTree
from paceline.rollout.trees.chain import StopPolicy, grow_chain
from paceline.rollout.trees.expander import Expander, TreeLimits, Uniform
from paceline.rollout.trees.ranked import grow_dynamic, grow_opt_tree
from paceline.rollout.trees.sampled import grow_dyspec, grow_static

TREES = ("dynamic", "opt_tree", "dyspec", "static")
DRAWS = ("likeliest", "replacement", "without_replacement")


@dataclass(slots=True)
class DraftRules:
    """How model-based drafters make their drafts.

    Attributes:
        tree: Builder of the drafts of width above 1: ``dynamic`` (EAGLE-2), ``opt_tree``, ``dyspec`` or
            ``static``.
        draw: ``likeliest`` tokens, which needs no verifier of its own and gives the tokens of plain decoding;
            or drawn from the drafter's distribution at the request's temperature, siblings with
            ``replacement`` or ``without_replacement``.
        stop: When a chain ends: ``fixed``, ``svip`` or ``specdec``.
        stop_threshold: Of that rule.
        gain: Least expected tokens that another level of an ``opt_tree`` must bring.

    Raises:
        ValueError: for names that do not exist or do not fit each other.
    """

    tree: str = "dynamic"
    draw: str = "likeliest"
    stop: str = "fixed"
    stop_threshold: float = 0.7
    gain: float = 0.05
    policy: StopPolicy | None = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value, known in (
            ("tree", self.tree, TREES),
            ("draw", self.draw, DRAWS),
            ("stop", self.stop, tuple(STOP_POLICIES)),
        ):
            if value not in known:
                raise ValueError(f"{name} is {value!r}; write one of {', '.join(known)}")
        ranked = self.tree in ("dynamic", "opt_tree")
        if ranked and self.draw != "likeliest":
            raise ValueError(
                f"tree {self.tree} ranks tokens by what they are, so they cannot be drawn: write draw "
                "likeliest"
            )
        if self.tree == "dyspec" and self.draw != "without_replacement":
            raise ValueError("tree dyspec draws siblings without replacement: write draw without_replacement")
        if self.tree == "static" and self.draw == "likeliest":
            raise ValueError(
                "tree static is for drawn tokens: write draw replacement or without_replacement, or tree "
                "dynamic"
            )
        made = STOP_POLICIES[self.stop]
        self.policy = None if made is None else made(self.stop_threshold)

    def kind(self, width: int) -> DraftKind:
        """How drafts of that width come about; what the builders in `paceline.rollout.trees` set
        themselves.
        """
        if self.draw == "likeliest":
            return DraftKind.FIXED
        return (
            DraftKind.WITH_REPLACEMENT
            if width == 1 or self.draw == "replacement"
            else DraftKind.WITHOUT_REPLACEMENT
        )

    def grow(self, expander: Expander, strategy: Strategy, sequences: Sequence[SequenceState]) -> DraftTree:
        """The draft that the strategy asks for."""
        seeds = seeds_of(sequences)
        roots = np.array([len(s.tokens) for s in sequences])

        def numbers(first: int, count: int) -> torch.Tensor:
            return step_uniforms(seeds, roots, first, count, Stream.DRAFT)

        uniform: Uniform | None = None if self.draw == "likeliest" else numbers
        if strategy.width == 1:
            greedy = torch.tensor(
                [s.request.params.greedy for s in sequences], device=expander.temperatures.device
            )
            return grow_chain(expander, strategy.depth, uniform, greedy, self.policy)
        limits = TreeLimits(strategy.depth, strategy.width, strategy.nodes)
        if uniform is None:
            return (
                grow_dynamic(expander, limits)
                if self.tree == "dynamic"
                else grow_opt_tree(expander, limits, self.gain)
            )
        if self.tree == "dyspec":
            return grow_dyspec(expander, limits, uniform)
        return grow_static(expander, limits, uniform, self.draw == "replacement")

    def learn(self, step: VerifiedStep) -> None:
        """Feeds a verified chain of this drafter to a stop policy that learns."""
        if isinstance(self.policy, LearnedThreshold) and step.draft.parents is None:
            self.policy.learn(step.draft.lengths.tolist(), [len(path) for path in step.paths])


def request_temperatures(sequences: Sequence[SequenceState], device: torch.device) -> torch.Tensor:
    """float32 [B]; 1 where a request is greedy, whose drafts are ranked by the drafter's own
    probabilities.
    """
    return torch.tensor([s.request.params.divisor for s in sequences], device=device)
