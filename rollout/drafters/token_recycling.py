"""Model-free drafting from the candidates that the target considered before."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from paceline.rollout.drafters.base import DraftContext, StatelessSlots, VerifiedStep
from paceline.rollout.drafters.best_first import best_first, pack
from paceline.rollout.drafters.model_drafts import DraftRules
from paceline.rollout.drafters.parts import DrafterHost, DrafterParts
from paceline.rollout.native import download
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import DraftKind, DraftTree

_CANDIDATES = 8  # successors kept for each token
_PRIOR_HITS = (8.0, 3.0, 2.0, 1.0, 1.0, 0.5, 0.5, 0.5)  # acceptances of each rank before any was counted
_HITS_DECAY = 0.999  # factor on the counts for each accepted token, so that they follow the policy
_MISS_SHARE = 0.2  # accepted tokens that no rank predicts, as a share of those that some rank does


class TokenRecyclingDrafter(StatelessSlots):
    """Drafts trees over the likeliest successors that the target last gave each token.

    Token Recycling (Luo et al., "Turning Trash into Treasure", arXiv 2408.08696): an adjacency matrix of 8
    successors per token is overwritten with the top 8 of every verified row of logits, those of rejected
    nodes included, and a static tree over successor ranks is drafted breadth first. The paper fixes that tree
    in advance; here the probability of each rank is estimated from acceptances, and the tree follows from
    these estimates. The drafts are deterministic.

    Args:
        vocab_size: Vocabulary size of the target.
    """

    name = "recycling"

    def __init__(self, vocab_size: int) -> None:
        self._successors = torch.full((vocab_size, _CANDIDATES), -1)
        self._hits = list(_PRIOR_HITS)

    @classmethod
    def build(cls, host: DrafterHost, parts: DrafterParts) -> TokenRecyclingDrafter:
        """Builds the drafter for an engine."""
        return cls(host.runner.vocab_size)

    @staticmethod
    def drafts(strategy: Strategy, rules: DraftRules) -> DraftKind:
        """Returns FIXED: drafts are a function of the committed tokens."""
        return DraftKind.FIXED

    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        """Drafts each sequence by best-first search over the successors."""
        tried = sum(self._hits) * (1 + _MISS_SHARE)
        probabilities = [hits / tried for hits in self._hits]

        def following(token: int) -> Iterator[tuple[float, int, int]]:
            successors = self._successors[token].tolist()
            for probability, successor in zip(probabilities, successors, strict=True):
                if successor >= 0:
                    yield probability, successor, successor

        return pack(
            [best_first(s.tokens[-1], following, strategy) for s in context.sequences], strategy.width
        )

    def verified(self, step: VerifiedStep) -> None:
        """Overwrites the successors of every verified token, and counts which ranks were accepted."""
        kept = min(_CANDIDATES, step.logits.shape[-1])
        drafted, likeliest = download(step.draft.tokens, step.logits.topk(kept, dim=-1).indices)
        last = torch.tensor([s.tokens[-1] for s in step.sequences])
        fed = torch.cat([last[:, None], drafted.long()], 1)
        if step.strategy.drafter == self.name:
            self._count(step, fed)
        real = torch.arange(fed.shape[1]) <= step.draft.lengths[:, None]
        self._successors[fed[real], :kept] = likeliest.long()

    def _count(self, step: VerifiedStep, fed: torch.Tensor) -> None:
        """Counts the successor ranks of the accepted tokens."""
        for row, path in enumerate(step.paths):
            above = int(fed[row, 0])
            for node in path:
                token = int(fed[row, node + 1])
                at = (self._successors[above] == token).nonzero()
                self._hits = [_HITS_DECAY * hits for hits in self._hits]
                if len(at):
                    self._hits[int(at[0, 0])] += 1
                above = token
