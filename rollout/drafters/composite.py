"""Two drafters at once: what has been said before where it matches, the model elsewhere."""

from __future__ import annotations

import torch

from paceline.rollout.drafters.base import DraftContext, Drafter, StatelessSlots
from paceline.rollout.drafters.model_drafts import DraftRules
from paceline.rollout.drafters.suffix import SuffixDrafter
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import DraftKind, DraftTree, chain_parents


class CompositeDrafter(StatelessSlots):
    """Takes the suffix drafter's proposal for sequences with a long match, the other's for the rest.

    SAM-Decoding (Hu et al., arXiv 2411.10666): where the longest suffix match is at least a threshold the
    retrieved continuation is likelier to be accepted than the model's, and free. The model does not run at
    all where every sequence has one.

    Args:
        suffix: Finds matches; also added to the engine, which keeps it informed.
        model: Drafts the rest; also added to the engine. Its drafts must be of the likeliest tokens.
        threshold: Tokens that a match must have.

    Raises:
        ValueError: for a model that draws its drafts.
    """

    name = "composite"

    def __init__(self, suffix: SuffixDrafter, model: Drafter, threshold: int = 5) -> None:
        rules = getattr(model, "rules", None)
        if rules is not None and rules.draw != "likeliest":
            raise ValueError(
                f"the composite drafter joins drafts of likeliest tokens, {model.name} draws {rules.draw}"
            )
        self._suffix, self._model, self.threshold = suffix, model, threshold

    @staticmethod
    def drafts(strategy: Strategy, rules: DraftRules) -> DraftKind:
        return DraftKind.FIXED

    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        long = [self._suffix.matched(s) >= self.threshold for s in context.sequences]
        if all(long):
            return self._suffix.propose(context, strategy)
        modelled = self._model.propose(context, strategy)
        if modelled.kind is not DraftKind.FIXED:
            raise ValueError(
                "the composite drafter joins drafts of likeliest tokens: write rollout.draft: likeliest"
            )
        if not any(long):
            return modelled
        return join(self._suffix.propose(context, strategy), modelled, long)


def join(one: DraftTree, other: DraftTree, choose_one: list[bool]) -> DraftTree:
    """Row by row the one draft or the other, both deterministic."""
    nodes = max(one.nodes, other.nodes)
    chosen = torch.tensor(choose_one)
    tokens = torch.where(chosen[:, None], _widen(one.tokens.cpu(), nodes), _widen(other.tokens.cpu(), nodes))
    lengths = torch.where(chosen, one.lengths, other.lengths)
    if one.parents is None and other.parents is None:
        return DraftTree(tokens, lengths, kind=DraftKind.FIXED)
    ours, theirs = (
        _widen(chain_parents(*d.tokens.shape) if d.parents is None else d.parents.cpu(), nodes, fill=-1)
        for d in (one, other)
    )
    return DraftTree(tokens, lengths, torch.where(chosen[:, None], ours, theirs), kind=DraftKind.FIXED)


def _widen(x: torch.Tensor, nodes: int, fill: int = 0) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, nodes - x.shape[1]), value=fill)
