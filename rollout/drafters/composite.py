"""Two drafters combined: retrieved text for sequences with a long match, a model for the others."""

from __future__ import annotations

import torch

from paceline.rollout.drafters.base import DraftContext, Drafter, StatelessSlots
from paceline.rollout.drafters.model_drafts import DraftRules
from paceline.rollout.drafters.parts import DrafterHost, DrafterParts
from paceline.rollout.drafters.suffix import SuffixDrafter
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import DraftKind, DraftTree, chain_parents


class CompositeDrafter(StatelessSlots):
    """Takes the suffix drafter's proposal for sequences with a long match, the model's for the others.

    SAM-Decoding (Hu et al., arXiv 2411.10666): if the longest suffix match reaches a threshold, the retrieved
    continuation is likelier to be accepted than the model's, and it is free. If every sequence has such a
    match, the model does not run at all.

    Args:
        suffix: Drafter that finds matches; it is also added to the engine, which keeps it informed.
        model: Drafter of the other sequences, also added to the engine. It must draft likeliest tokens.
        threshold: Minimum length of a match in tokens.

    Raises:
        ValueError: The model's drafts are drawn.
    """

    name = "composite"

    def __init__(self, suffix: SuffixDrafter, model: Drafter, threshold: int = 5) -> None:
        rules = getattr(model, "rules", None)
        if rules is not None and rules.draw != "likeliest":
            raise ValueError(
                f"the composite drafter joins drafts of likeliest tokens, but {model.name} draws "
                f"{rules.draw}: write speculation.draw: likeliest"
            )
        self._suffix, self._model, self.threshold = suffix, model, threshold
        self._asked_model = False

    @classmethod
    def build(cls, host: DrafterHost, parts: DrafterParts) -> CompositeDrafter:
        """Builds the drafter for an engine, from its suffix and eagle3 drafters.

        Raises:
            ValueError: The engine lacks one of the two.
        """
        suffix, model = host.drafters.get("suffix"), host.drafters.get("eagle3")
        if not isinstance(suffix, SuffixDrafter) or model is None:
            raise ValueError("the composite drafter joins suffix and eagle3: add these two drafters first")
        return cls(suffix, model, parts.composite_match)

    @staticmethod
    def drafts(strategy: Strategy, rules: DraftRules) -> DraftKind:
        """Returns FIXED: both drafters draft a function of the committed tokens."""
        return DraftKind.FIXED

    def prepare(self, strategy: Strategy) -> None:
        """Prepares the model's drafts, see `Drafter`."""
        prepare = getattr(self._model, "prepare", None)
        if prepare is not None:
            prepare(strategy)

    @property
    def caught_up(self) -> bool:
        """Whether the model has caught up in the last draft, see `Drafter`."""
        return self._asked_model and getattr(self._model, "caught_up", False)

    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        """Returns the suffix drafter's rows where the match is long enough, the model's elsewhere."""
        matches = [self._suffix.matched(s) >= self.threshold for s in context.sequences]
        self._asked_model = not all(matches)
        if not self._asked_model:
            return self._suffix.propose(context, strategy)
        model_draft = self._model.propose(context, strategy)
        if model_draft.kind is not DraftKind.FIXED:
            raise ValueError(
                f"the composite drafter joins drafts of likeliest tokens, but a draft of {self._model.name} "
                f"is {model_draft.kind}: write speculation.draw: likeliest"
            )
        if not any(matches):
            return model_draft
        return join(self._suffix.propose(context, strategy), model_draft, matches)


def join(one: DraftTree, other: DraftTree, choose_one: list[bool]) -> DraftTree:
    """Chooses between two deterministic drafts row by row: ``one`` where ``choose_one`` is true."""
    nodes = max(one.nodes, other.nodes)
    chosen = torch.tensor(choose_one)
    tokens = torch.where(chosen[:, None], _widen(one.tokens.cpu(), nodes), _widen(other.tokens.cpu(), nodes))
    lengths = torch.where(chosen, one.lengths, other.lengths)
    if one.parents is None and other.parents is None:
        return DraftTree(tokens, lengths, kind=DraftKind.FIXED)
    parents, other_parents = (
        _widen(chain_parents(*d.tokens.shape) if d.parents is None else d.parents.cpu(), nodes, fill=-1)
        for d in (one, other)
    )
    parents = torch.where(chosen[:, None], parents, other_parents)
    return DraftTree(tokens, lengths, parents, kind=DraftKind.FIXED)


def _widen(x: torch.Tensor, nodes: int, fill: int = 0) -> torch.Tensor:
    return torch.nn.functional.pad(x, (0, nodes - x.shape[1]), value=fill)
