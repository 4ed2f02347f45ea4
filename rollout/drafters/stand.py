"""Model-free drafting that draws from probabilities the target computed earlier."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import torch

from paceline.rollout.counter_rng import Stream, step_uniforms
from paceline.rollout.drafters.base import DraftContext, StatelessSlots, VerifiedStep
from paceline.rollout.drafters.model_drafts import DraftRules
from paceline.rollout.native import download
from paceline.rollout.sequence import SequenceState, seeds_of
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import DraftKind, DraftTree
from paceline.rollout.trees.expander import draw_without_replacement

_CANDIDATES = 8  # likeliest next tokens that are kept for a context
_MAX_CONTEXT = 3  # tokens of the longest contexts


class StandDrafter(StatelessSlots):
    """Draws drafts from an n-gram table of the target's likeliest tokens *and their logits*.

    STAND (Song et al., "Accelerated Test-Time Scaling with Model-Free Speculative Sampling", arXiv
    2506.04708): reasoning traces repeat each other, and at high temperature a draft drawn with probabilities
    is accepted more often than a repeated token. For each context of up to 3 tokens, the table keeps the
    logits of the 8 likeliest next tokens at the context's last verification. A draft takes the longest known
    context and draws siblings without replacement by Gumbel-top-k; the branching factor halves from level to
    level.

    The paper optimises the tree's shape on data in advance; here depth, width and nodes come from the
    strategy, which the selector chooses from measured times.

    Args:
        max_contexts: Maximum number of contexts, about 300 bytes each; the least recently seen are dropped
            first.
    """

    name = "stand"

    def __init__(self, max_contexts: int = 500_000) -> None:
        self.max_contexts = max_contexts
        self._table: OrderedDict[tuple[int, ...], tuple[np.ndarray, np.ndarray]] = OrderedDict()

    @staticmethod
    def drafts(strategy: Strategy, rules: DraftRules | None = None) -> DraftKind:
        """Returns WITH_REPLACEMENT for chains, which have no siblings, and WITHOUT_REPLACEMENT for trees."""
        return DraftKind.WITH_REPLACEMENT if strategy.width == 1 else DraftKind.WITHOUT_REPLACEMENT

    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        """Draws a draft for each sequence."""
        rows = [self._draw_row(s, strategy) for s in context.sequences]
        nodes = max(len(row) for row in rows)
        batch = len(rows)
        tokens = np.zeros((batch, nodes), np.int64)
        parents = np.full((batch, nodes), -1, np.int64)
        kept = max((len(known) for row in rows for _, _, known, _ in row), default=1)
        probs = np.zeros((batch, nodes, kept), np.float32)
        ids = np.broadcast_to(np.arange(kept, dtype=np.int64), probs.shape).copy()
        for i, row in enumerate(rows):
            for j, (token, parent, known, q) in enumerate(row):
                tokens[i, j], parents[i, j], ids[i, j], probs[i, j] = token, parent, known, q
        lengths = torch.tensor([len(row) for row in rows])
        return DraftTree(
            torch.from_numpy(tokens),
            lengths,
            None if strategy.width == 1 else torch.from_numpy(parents),
            torch.from_numpy(probs),
            torch.from_numpy(ids),
            self.drafts(strategy),
        )

    def _draw_row(
        self, sequence: SequenceState, strategy: Strategy
    ) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
        """Draws one sequence's nodes.

        Returns:
            (token, parent, ids among which the token was drawn, their probabilities) of each node, in the
            order of drawing.
        """
        row: list[tuple[int, int, np.ndarray, np.ndarray]] = []
        temperature = sequence.request.params.divisor
        seed, root = seeds_of([sequence]), np.array([len(sequence.tokens)])
        level: list[tuple[int, tuple[int, ...]]] = [(-1, tuple(sequence.tokens[-_MAX_CONTEXT:]))]
        width, used = strategy.width, 0
        for _ in range(strategy.depth):
            below: list[tuple[int, tuple[int, ...]]] = []
            for parent, text in level:
                known = self._lookup(text)
                count = min(width, strategy.nodes - len(row))
                if known is None or count <= 0:
                    continue
                q = torch.from_numpy(np.exp((known[1] - known[1].max()) / temperature)).float()
                noise = step_uniforms(seed, root, used, len(q), Stream.DRAFT)[0]
                used += len(q)
                columns, drawn_from = draw_without_replacement(q / q.sum(), noise, min(count, len(q)))
                for column, probs in zip(columns.tolist(), drawn_from.numpy(), strict=True):
                    token = int(known[0][column])
                    below.append((len(row), (*text, token)[-_MAX_CONTEXT:]))
                    row.append((token, parent, known[0], probs))
            level, width = below, max(width // 2, 1)
        return row

    def _lookup(self, text: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray] | None:
        for n in range(len(text), 0, -1):
            known = self._table.get(text[-n:])
            if known is not None:
                return known
        return None

    def verified(self, step: VerifiedStep) -> None:
        """Stores the target's likeliest tokens at the committed text and along the accepted path."""
        values, ids = step.logits.topk(min(_CANDIDATES, step.logits.shape[-1]), dim=-1)
        values, ids, draft_tokens = download(values, ids, step.draft.tokens)
        ids, order = ids.long().sort(dim=-1)  # `DraftTree.vocabulary` is in increasing order
        logits = values.float().gather(-1, order).numpy()
        tokens, drafted = ids.numpy(), draft_tokens.long().tolist()
        start = 0
        for row, (sequence, path) in enumerate(zip(step.sequences, step.paths, strict=True)):
            text = tuple(sequence.tokens[-_MAX_CONTEXT:])
            self._store(text, tokens[start], logits[start])
            for node in path:
                text = (*text, drafted[row][node])[-_MAX_CONTEXT:]
                self._store(text, tokens[start + 1 + node], logits[start + 1 + node])
            start += int(step.draft.lengths[row]) + 1
        while len(self._table) > self.max_contexts:
            self._table.popitem(last=False)

    def _store(self, text: tuple[int, ...], ids: np.ndarray, logits: np.ndarray) -> None:
        for n in range(1, len(text) + 1):
            self._table[text[-n:]] = ids, logits
            self._table.move_to_end(text[-n:])
