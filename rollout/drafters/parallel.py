"""Drafts in one pass of the EAGLE-3 model, instead of one pass for each token (P-EAGLE)."""

from __future__ import annotations

from paceline.rollout.drafters.base import DraftContext, StatelessSlots, VerifiedStep
from paceline.rollout.drafters.eagle3 import Eagle3Drafter
from paceline.rollout.drafters.model_drafts import DraftRules
from paceline.rollout.drafters.parts import DrafterHost, DrafterParts
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import DraftKind, DraftTree


class ParallelDrafter(StatelessSlots):
    """Drafts with the engine's EAGLE-3 drafter, but reads the new tokens and drafts in a single pass.

    P-EAGLE (arXiv 2602.01469): masks follow the newest token, and the output at each of them predicts one
    more token. A later position does not know which tokens were drafted before it, so it is accepted more
    rarely than in a chain of passes; but a draft costs one pass however deep it is. Every node of a level of
    a tree has the same distribution, which is the one that is reported, so all verifiers stay lossless.

    Args:
        model: The EAGLE-3 drafter, also added to the engine, which keeps it informed. Its weights have a
            mask.
    """

    name = "parallel"
    needs_taps = True

    def __init__(self, model: Eagle3Drafter) -> None:
        self._model, self.rules = model, model.parallel_rules

    @classmethod
    def build(cls, host: DrafterHost, parts: DrafterParts) -> ParallelDrafter:
        """Builds the drafter for an engine, from its eagle3 drafter.

        Raises:
            ValueError: The engine lacks it, or its weights have no mask.
        """
        model = host.drafters.get("eagle3")
        if not isinstance(model, Eagle3Drafter):
            raise ValueError("the parallel drafter drafts with eagle3: add that drafter first")
        if model.mask_token is None:
            raise ValueError(
                "the parallel drafter needs weights that were trained to draft in one pass: set "
                "drafter.parallel_positions"
            )
        return cls(model)

    @staticmethod
    def drafts(strategy: Strategy, rules: DraftRules) -> DraftKind:
        """Returns the kind of drafts of the strategy's width under ``rules``, see `Drafter`."""
        return rules.kind(strategy.width)

    @property
    def caught_up(self) -> bool:
        """Whether the model read much in the last draft, see `Drafter`."""
        return self._model.caught_up

    def prepare(self, strategy: Strategy) -> None:
        """Captures the graphs of a strategy's drafts for every batch, see `Drafter`."""
        self._model.prepare_parallel(strategy)

    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        """Reads newly committed tokens and drafts, in one pass."""
        return self._model.propose_parallel(context, strategy)

    def verified(self, step: VerifiedStep) -> None:
        """Passes verifications of this drafter's drafts on to the stop policy."""
        if step.strategy.drafter == self.name:
            self.rules.learn(step)
