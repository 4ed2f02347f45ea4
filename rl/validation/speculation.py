"""Rules for the ``speculation`` section, and whether its verifier covers what its drafters draft."""

from __future__ import annotations

import difflib
from collections.abc import Sequence

from paceline.rl.config.speculation import SpeculationConfig
from paceline.rl.errors import UserError
from paceline.rl.validation.rules import Rule, at_least, one_of
from paceline.rollout import Strategy
from paceline.rollout.drafters import DRAFTERS, DraftRules
from paceline.rollout.drafters.coverage import refusal, stated_kind
from paceline.rollout.strategy import default_arms
from paceline.rollout.trees import MAX_NODES, TREES, DraftKind
from paceline.rollout.verify import VERIFIERS, Verifier


def speculation_rules(s: SpeculationConfig) -> list[Rule]:
    """Returns rules for the section's numbers and for drafters that need each other."""
    return [
        *one_of(TREES, {"speculation.tree": s.tree}),
        *one_of(VERIFIERS, {} if s.verifier is None else {"speculation.verifier": s.verifier}),
        (1 <= s.max_nodes <= MAX_NODES, f"speculation.max_nodes is {s.max_nodes}: write 1 to {MAX_NODES}"),
        (0 <= s.epsilon < 1, f"speculation.epsilon is {s.epsilon}: write a number in [0, 1)"),
        *at_least(1, {"speculation.eagle3_window": s.eagle3_window}, ", or null"),
        (
            "draft_model" not in s.drafters or s.draft_model is not None,
            "speculation.drafters has draft_model, but no model is named: write speculation.draft_model",
        ),
        (
            "composite" not in s.drafters or {"suffix", "eagle3"} <= set(s.drafters),
            "speculation.drafters has composite, which combines suffix and eagle3: list those too",
        ),
        (
            "parallel" not in s.drafters or "eagle3" in s.drafters,
            "speculation.drafters has parallel, which drafts with the weights of eagle3: list that too",
        ),
        (
            s.draw == "likeliest" or "composite" not in s.drafters,
            "speculation.drafters has composite, which combines drafts of likeliest tokens: leave it out, or "
            "write speculation.draw: likeliest",
        ),
    ]


def check_strategies(s: SpeculationConfig) -> None:
    """Checks that drafters and strategies exist, fit each other, and are covered by the verifier.

    Raises:
        UserError: The first problem, in one line.
    """
    for name in s.drafters:
        if name not in DRAFTERS:
            close = difflib.get_close_matches(name, DRAFTERS, n=1, cutoff=0.0)[0]
            raise UserError(
                f"speculation.drafters has {name!r}; did you mean {close}? There are: {', '.join(DRAFTERS)}"
            )
    try:
        rules = draft_rules(s)
        named = [
            Strategy.parse(text)
            for text in (s.arms if s.strategy in ("adaptive", "plain") else (*s.arms, s.strategy))
        ]
    except ValueError as error:
        raise UserError(f"speculation: {error}") from None
    if s.verifier is not None:
        _check_verifier(s, VERIFIERS[s.verifier], rules, named)


def _check_verifier(
    s: SpeculationConfig, verifier: Verifier, rules: DraftRules, named: Sequence[Strategy]
) -> None:
    """Checks that the verifier is needed, and that it covers the drafts of every strategy that may run.

    Args:
        s: The section.
        verifier: The chosen verifier.
        rules: How model-based drafters draft.
        named: Strategies that the recipe names.

    Raises:
        UserError: All drafts are the likeliest tokens, or a strategy's drafts would not keep the target's
            distribution under this verifier.
    """
    adaptive = s.strategy == "adaptive" and not s.arms
    may_run = [arm for arm in (_default_strategies(s) if adaptive else named) if arm.drafter in DRAFTERS]
    kinds = {stated_kind(DRAFTERS[arm.drafter], arm, rules) for arm in may_run if arm.drafter is not None}
    if kinds <= {DraftKind.FIXED} and s.draw == "likeliest":
        raise UserError(
            f"speculation.verifier is {s.verifier}, but likeliest drafts need none: write "
            "speculation.verifier: null, or another speculation.draw"
        )
    for arm in may_run:
        problem = None if arm.drafter is None else refusal(verifier, DRAFTERS[arm.drafter], arm, rules)
        if problem is not None:
            where = f"speculation.arms (empty includes {arm})" if adaptive else f"speculation, strategy {arm}"
            raise UserError(f"{where}: {problem}")


def _default_strategies(s: SpeculationConfig) -> list[Strategy]:
    """Returns the strategies that empty ``arms`` stand for."""
    return [
        arm
        for name in s.drafters
        for arm in default_arms(name, s.max_nodes, getattr(DRAFTERS[name], "chains_only", False))
    ]


def draft_rules(s: SpeculationConfig) -> DraftRules:
    """Builds the rules by which model-based drafters draft.

    Raises:
        ValueError: ``tree``, ``draw`` and ``stop`` do not fit each other.
    """
    return DraftRules(s.tree, s.draw, s.stop, s.stop_threshold, s.tree_gain)
