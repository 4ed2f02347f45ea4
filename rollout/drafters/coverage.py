"""Checks whether a verifier covers a strategy's drafts, as far as is known before drafting."""

from __future__ import annotations

from paceline.rollout.drafters.base import Drafter
from paceline.rollout.drafters.model_drafts import DraftRules
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import DraftKind
from paceline.rollout.verify import Verifier, default_verifier


def stated_kind(drafter: Drafter | type[Drafter], strategy: Strategy, rules: DraftRules) -> DraftKind | None:
    """Returns the kind that a drafter states for a strategy's drafts, or None if it states none.

    `Drafter` describes how a drafter states it.
    """
    drafts = getattr(drafter, "drafts", None)
    return None if drafts is None else drafts(strategy, rules)


def refusal(
    verifier: Verifier | None,
    drafter: Drafter | type[Drafter],
    strategy: Strategy,
    rules: DraftRules | None = None,
) -> str | None:
    """Returns, in one line, why a verifier does not cover a drafter's drafts for a strategy.

    Args:
        verifier: Verifier to check; None for the default.
        drafter: The drafter or its class, which states the same.
        strategy: Strategy that the drafts are for.
        rules: Rules of model-based drafters; None for the drafter's own.

    Returns:
        None if the verifier covers the drafts, if they are fixed and need no verifier, and if the drafter
        states no kind: its drafts are then checked one by one.
    """
    if rules is None:
        rules = getattr(drafter, "rules", None) or DraftRules()
    kind = stated_kind(drafter, strategy, rules)
    if kind is None or kind is DraftKind.FIXED:
        return None
    chain = strategy.width == 1 or getattr(drafter, "chains_only", False)
    return (verifier or default_verifier(chain)).refusal(kind, chain)
