"""Model-free drafting from the candidates that the target considered before."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from paceline.rollout.drafters.base import DraftContext, StatelessSlots, VerifiedStep
from paceline.rollout.drafters.best_first import best_first, pack
from paceline.rollout.drafters.model_drafts import DraftRules
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import DraftKind, DraftTree

_CANDIDATES = 8
_PRIOR = (8.0, 3.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.5)


class TokenRecyclingDrafter(StatelessSlots):
    """For every token the target's last likeliest successors; a draft is a tree over these.

    Token Recycling (Luo et al., "Turning Trash into Treasure", arXiv 2408.08696): an adjacency matrix of 8
    successors per token is overwritten with the top 8 of every verified row of logits, rejected nodes'
    included, and a static tree over successor ranks is drafted breadth first. The paper fixes that tree
    beforehand; here the chance of each rank is what acceptance has shown, and the tree follows from those.
    Deterministic.

    Args:
        vocab_size: Of the target.
    """

    name = "recycling"

    def __init__(self, vocab_size: int) -> None:
        self._successors = torch.full((vocab_size, _CANDIDATES), -1)
        self._hits = list(_PRIOR)

    @staticmethod
    def drafts(strategy: Strategy, rules: DraftRules) -> DraftKind:
        return DraftKind.FIXED

    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        tried = sum(self._hits) * 1.2
        chances = [hits / tried for hits in self._hits]

        def following(token: int) -> Iterator[tuple[float, int, int]]:
            for chance, successor in zip(chances, self._successors[token].tolist(), strict=True):
                if successor >= 0:
                    yield chance, successor, successor

        return pack(
            [best_first(s.tokens[-1], following, strategy) for s in context.sequences], strategy.width
        )

    def verified(self, step: VerifiedStep) -> None:
        last = torch.tensor([s.tokens[-1] for s in step.sequences], device=step.draft.tokens.device)
        fed = torch.cat([last[:, None], step.draft.tokens], 1).cpu()
        if step.strategy.drafter == self.name:
            self._count(step, fed)
        real = torch.arange(fed.shape[1]) <= step.draft.lengths[:, None]
        kept = min(_CANDIDATES, step.logits.shape[-1])
        self._successors[fed[real], :kept] = step.logits.topk(kept, dim=-1).indices.cpu()

    def _count(self, step: VerifiedStep, fed: torch.Tensor) -> None:
        """Which ranks the accepted tokens had."""
        for row, path in enumerate(step.paths):
            above = int(fed[row, 0])
            for node in path:
                token = int(fed[row, node + 1])
                at = (self._successors[above] == token).nonzero()
                self._hits = [0.999 * hits for hits in self._hits]
                if len(at):
                    self._hits[int(at[0, 0])] += 1
                above = token
