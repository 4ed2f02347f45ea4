"""Which strategies a verifier covers, as far as it is known before anything is drafted."""

from __future__ import annotations

from paceline.rollout.drafters.base import Drafter
from paceline.rollout.drafters.model_drafts import DraftRules
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import DraftKind
from paceline.rollout.verify import Verifier, default_verifier


def stated_kind(drafter: Drafter | type[Drafter], strategy: Strategy, rules: DraftRules) -> DraftKind | None:
    """How a drafter says that its drafts for a strategy come about (`Drafter` tells how it says so); None
    where it does not.
    """
    states = getattr(drafter, "drafts", None)
    return None if states is None else states(strategy, rules)


def refusal(
    verifier: Verifier | None,
    drafter: Drafter | type[Drafter],
    strategy: Strategy,
    rules: DraftRules | None = None,
) -> str | None:
    """Why a verifier does not cover what a drafter drafts for a strategy, in one line.

    Args:
        verifier: None for the default.
        drafter: Or its class, which knows as much.
        strategy: What it is asked for.
        rules: Of model-based drafters; None for the drafter's own.

    Returns:
        None where the verifier covers it, where it is fixed and needs no verifier, and where the drafter
        states no kind: what it drafts is then judged draft by draft.
    """
    if rules is None:
        rules = getattr(drafter, "rules", None) or DraftRules()
    kind = stated_kind(drafter, strategy, rules)
    if kind is None or kind is DraftKind.FIXED:
        return None
    chain = strategy.width == 1 or getattr(drafter, "chains_only", False)
    return (verifier or default_verifier(chain)).refusal(kind, chain)
