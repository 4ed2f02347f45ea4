"""Rules that turn a model's distributions into a draft: which tree, how tokens are drawn, when it ends."""

from __future__ import annotations

from dataclasses import dataclass, field

from paceline.rollout.drafters.base import VerifiedStep
from paceline.rollout.drafters.draft_rows import DraftRows
from paceline.rollout.strategy.stop_policy import STOP_POLICIES, LearnedThreshold
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import TREES, DraftKind, DraftTree, TreeOptions
from paceline.rollout.trees.chain import StopPolicy, grow_chain
from paceline.rollout.trees.expander import Expander, TreeLimits

DRAWS = ("likeliest", "replacement", "without_replacement")


@dataclass(slots=True)
class DraftRules:
    """How model-based drafters make their drafts.

    Attributes:
        tree: Builder of drafts of width above 1: ``dynamic`` (EAGLE-2), ``opt_tree``, ``dyspec`` or
            ``static``.
        draw: How tokens are chosen. ``likeliest`` tokens need no verifier of their own and give the tokens of
            plain decoding. ``replacement`` and ``without_replacement`` draw siblings from the drafter's
            distribution at the request's temperature.
        stop: Rule that ends a chain: ``fixed``, ``svip`` or ``specdec``.
        stop_threshold: Threshold of that rule.
        gain: Minimum expected tokens that a further level of an ``opt_tree`` must add.

    Raises:
        ValueError: A name is unknown, or the rules do not fit each other.
    """

    tree: str = "dynamic"
    draw: str = "likeliest"
    stop: str = "fixed"
    stop_threshold: float = 0.7
    gain: float = 0.05
    policy: StopPolicy | None = field(init=False, default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name, value, choices in (
            ("tree", self.tree, tuple(TREES)),
            ("draw", self.draw, DRAWS),
            ("stop", self.stop, tuple(STOP_POLICIES)),
        ):
            if value not in choices:
                raise ValueError(f"{name} is {value!r}: write one of {', '.join(choices)}")
        draws = TREES[self.tree].draws
        if self.draw not in draws:
            raise ValueError(
                f"tree {self.tree} and draw {self.draw} cannot be combined: write draw {' or '.join(draws)}, "
                f"or another tree"
            )
        create_policy = STOP_POLICIES[self.stop]
        self.policy = None if create_policy is None else create_policy(self.stop_threshold)

    def kind(self, width: int) -> DraftKind:
        """Returns the kind that the builders in `paceline.rollout.trees` give to drafts of that width."""
        if self.draw == "likeliest":
            return DraftKind.FIXED
        return (
            DraftKind.WITH_REPLACEMENT
            if width == 1 or self.draw == "replacement"
            else DraftKind.WITHOUT_REPLACEMENT
        )

    def grow(self, expander: Expander, strategy: Strategy, rows: DraftRows) -> DraftTree:
        """Builds the draft that the strategy asks for."""
        if strategy.width == 1:
            uniform = None if self.draw == "likeliest" else rows.uniforms
            return grow_chain(expander, strategy.depth, uniform, rows.greedy, self.policy)
        limits = TreeLimits(strategy.depth, strategy.width, strategy.nodes)
        options = TreeOptions(rows.uniforms, self.draw == "replacement", self.gain)
        return TREES[self.tree].grow(expander, limits, options)

    def is_likeliest_chain(self, strategy: Strategy) -> bool:
        """Returns whether a draft is a chain of likeliest tokens of a fixed length."""
        return strategy.width == 1 and self.draw == "likeliest" and self.policy is None

    def has_fixed_work(self, strategy: Strategy) -> bool:
        """Returns whether a draft takes the same operators whatever it drafts, so that graphs can hold it."""
        return self.policy is None if strategy.width == 1 else TREES[self.tree].fixed_work

    def learn(self, step: VerifiedStep) -> None:
        """Feeds a verified chain of this drafter to a stop policy that learns."""
        if isinstance(self.policy, LearnedThreshold) and step.draft.parents is None:
            self.policy.learn(step.draft.lengths.tolist(), [len(path) for path in step.paths])
