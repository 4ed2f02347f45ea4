"""Training-time test: trains the drafter on its own outputs, as it runs when it drafts."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from paceline.drafter_trainer.objective.draft_objective import Objective, Unrolled
from paceline.drafter_trainer.objective.draft_positions import DraftPositions
from paceline.drafter_trainer.objective.losses import LOSSES
from paceline.drafter_trainer.objective.parallel_drafts import add_parallel_drafts
from paceline.drafter_trainer.objective.unrolled_attention import UnrolledAttention
from paceline.drafter_trainer.packing import DraftBatch
from paceline.rollout.drafters.eagle3_model import Eagle3Model, attention_shape


def unrolled_loss(
    model: Eagle3Model,
    embed_tokens: nn.Module,
    batch: DraftBatch,
    objective: Objective,
    check: Callable[[], None] | None = None,
    draw: torch.Generator | None = None,
) -> Unrolled:
    """Computes the loss over several draft positions, each fed with the output of the one before.

    Source: EAGLE-3 (arXiv 2503.01840), section 3.2, figure 6. At position m, an anchor attends to the real
    features of the left context and of anchors up to its own, and to its own positions 1 … m, as a draft that
    starts there does. Only anchors from the prompt's last token on count, because drafting can start there.

    With ``objective.parallel``, drafts in one pass (`add_parallel_drafts`) share the first position, and the
    loss is the weighted mean over the positions of both kinds.

    Args:
        model: The drafter.
        embed_tokens: The target's input embedding, frozen.
        batch: Batch from `pack`.
        objective: Loss and its options.
        check: Function called at every draft position of the forward pass and again of the backward pass; it
            may raise `Interrupted`.
        draw: Random numbers that choose the anchors of drafts in one pass; None takes all anchors.
    """
    chains = DraftPositions(batch, objective)
    draft = _Unroll(model, embed_tokens, batch)
    parallel: DraftPositions | None = None
    for step in range(objective.unroll):
        if step == 1 and objective.on_policy > 0 and len(batch.rejected_drafts):
            values = LOSSES[objective.loss](draft.logits_after_rejected(), batch.rejected_teacher)
            weights = chains.anchor_weights[batch.rejected_drafts[:, 0]]
            chains.total = chains.total + objective.on_policy * (values * weights).sum()
        draft.advance()
        if check is not None:
            draft.watch(check)
        rows = chains.advance(step)
        chains.add(step, rows, draft.logits(rows))
        if step == 0 and objective.parallel > 1:
            parallel = chains.fork()
            add_parallel_drafts(model, embed_tokens, batch, objective, parallel, draft.attention, draw)
    return _outcome(batch, objective, chains, parallel)


def _outcome(
    batch: DraftBatch, objective: Objective, chains: DraftPositions, parallel: DraftPositions | None
) -> Unrolled:
    """Returns the loss and the statistics of chains and, if there are any, of drafts in one pass."""
    total, weight, lengths = chains.total, chains.weight, chains.lengths
    if parallel is not None:
        total, weight = total + parallel.total, weight + parallel.weight
        lengths = parallel.lengths if objective.unroll == 1 else (lengths + parallel.lengths) / 2
    sampled, likeliest = (lengths * (chains.drafting * chains.anchor_weights)).sum(-1).tolist()
    return Unrolled(
        total / weight,
        chains.acceptance,
        chains.likeliest,
        [] if parallel is None else parallel.acceptance,
        sampled,
        likeliest,
        _by_piece(lengths, batch.pieces, chains.drafting),
    )


def _by_piece(values: torch.Tensor, pieces: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Returns the means of values [2, N] over the counted anchors of each piece, [2, P]."""
    count = int(pieces.max()) + 1
    sums = values.new_zeros(2, count).index_add_(1, pieces, values * counted)
    return sums / values.new_zeros(count).index_add_(0, pieces, counted.to(values))


class _Unroll:
    """Runs the drafter over a batch one draft position at a time; each pass feeds the next."""

    def __init__(self, model: Eagle3Model, embed_tokens: nn.Module, batch: DraftBatch) -> None:
        self._model, self._embed_tokens, self._batch = model, embed_tokens, batch
        self._hidden = model.fc(batch.taps)[None]
        self.attention = UnrolledAttention(
            batch, attention_shape(model.config)[2] ** -0.5, self._context_keys()
        )
        self._step = 0

    def _context_keys(self) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Returns the keys and values of the left context; None if there is none."""
        context = self._batch.context
        if not len(context.tokens):
            return None
        hidden = self._model.fc(context.taps)[None]
        return self._model.keys(self._embed(context.tokens), hidden, context.positions[None])

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self._embed_tokens(tokens)[None].to(self._hidden.dtype)

    def advance(self) -> None:
        """Moves every anchor one draft position further along its text."""
        batch, step = self._batch, self._step
        embeds = self._embed(batch.tokens[batch.anchor_index + 1 + step])
        self._hidden = self._model.step(embeds, self._hidden, (batch.positions + step)[None], self.attention)
        self._step += 1

    def watch(self, check: Callable[[], None]) -> None:
        """Calls ``check`` now, and again when the backward pass reaches this position."""
        check()
        if self._hidden.requires_grad:
            self._hidden.register_hook(lambda _: check())

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """Returns the logits [M, W] of anchors ``rows``, int64 [M], at the current position."""
        return self._model.logits(self._hidden[0, rows])

    def logits_after_rejected(self) -> torch.Tensor:
        """Returns the logits [D, W] one position further, after rejected tokens instead of the text's."""
        rows, tokens = self._batch.rejected_drafts.unbind(1)
        positions = (self._batch.positions[rows] + self._step)[None]
        hidden = self._model.step(
            self._embed(tokens), self._hidden[:, rows], positions, self.attention.branch(rows)
        )
        return self._model.logits(hidden[0])
