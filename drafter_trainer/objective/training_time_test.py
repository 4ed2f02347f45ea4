"""Training-time test: trains the drafter on its own outputs, as it runs when it drafts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from paceline.drafter_trainer.objective.losses import LENGTH_LOSS, LOSSES
from paceline.drafter_trainer.objective.unrolled_attention import UnrolledAttention
from paceline.drafter_trainer.packing import DraftBatch
from paceline.rollout.drafters.eagle3_model import Eagle3Model, attention_shape


@dataclass(frozen=True, slots=True)
class Objective:
    """What the drafter is trained for.

    Attributes:
        loss: Name of a loss in `LOSSES`, or ``length``: minus the expected acceptance length of the whole
            draft, over all positions at once.
        unroll: Number of draft positions.
        decay: Weight of each position relative to the one before; ``length`` ignores it.
        mask_top: Number of the drafter's likeliest tokens that must include the target's likeliest. Where
            they do not, the draft position and all later ones of that anchor are left out of the loss
            (GRIFFIN, arXiv 2502.11018). None leaves nothing out.
        feedback_only: Whether to train only where verification rejected a draft, on the target's distribution
            there (online speculative decoding, arXiv 2310.07177).
        on_policy: Loss weight of the second draft position after the drafter's own rejected tokens, for which
            verification has already computed the target's distribution (DistillSpec, arXiv 2310.08461, trains
            on the drafter's own outputs).
    """

    loss: str = "fkl"
    unroll: int = 3
    decay: float = 0.8
    mask_top: int | None = None
    feedback_only: bool = False
    on_policy: float = 0.0


@dataclass(frozen=True, slots=True)
class Unrolled:
    """The loss and acceptance statistics of one pass over a batch.

    Attributes:
        loss: Scalar loss.
        acceptance: Σ_y min(p, q) at each draft position, the probability that a sampled draft token is
            accepted; mean over the position's anchors.
        likeliest: p(argmax q) at each draft position, the probability that the drafter's likeliest token is
            accepted; mean over the position's anchors.
        length: Expected number of tokens that one verification of sampled drafts commits, 1 + E[Σ_i Π_{j≤i}
            acceptance_j].
        likeliest_length: Expected number of tokens that one verification of likeliest-token drafts commits.
        by_piece: float32 [2, P], ``length`` and ``likeliest_length`` of each piece; NaN for a piece in which
            nothing can be drafted.
    """

    loss: torch.Tensor
    acceptance: list[float]
    likeliest: list[float]
    length: float
    likeliest_length: float
    by_piece: torch.Tensor


class Interrupted(Exception):
    """An update was interrupted; the weights have not changed."""


def unrolled_loss(
    model: Eagle3Model,
    embed_tokens: nn.Module,
    batch: DraftBatch,
    objective: Objective,
    check: Callable[[], None] | None = None,
) -> Unrolled:
    """Computes the loss over several draft positions, each fed with the output of the one before.

    Source: EAGLE-3 (arXiv 2503.01840), section 3.2, figure 6. At position m, an anchor attends to the real
    features of the left context and of anchors up to its own, and to its own positions 1 … m, as a draft that
    starts there does. Only anchors from the prompt's last token on count, because drafting can start there.

    Args:
        model: The drafter.
        embed_tokens: The target's input embedding, frozen.
        batch: Batch from `pack`.
        objective: Loss and its options.
        check: Function called at every draft position of the forward pass and again of the backward pass; it
            may raise `Interrupted`.
    """
    anchors = len(batch.anchor_index)
    counted = batch.trained[batch.anchor_index]
    anchor_weights = batch.weights / batch.weights[counted].sum().clamp(min=1e-8)
    alive = counted.clone()
    total = batch.taps.new_zeros(())
    weight_sum = 0.0
    drafting = counted.clone()
    surrogate = torch.ones(anchors, device=batch.anchor_index.device)
    statistics = _AcceptanceStatistics(anchors, batch.anchor_index.device)
    draft = _Unroll(model, embed_tokens, batch)
    for step in range(objective.unroll):
        if step == 1 and objective.on_policy > 0 and len(batch.rejected_drafts):
            values = LOSSES[objective.loss](draft.logits_after_rejected(), batch.rejected_teacher)
            total = total + objective.on_policy * (values * anchor_weights[batch.rejected_drafts[:, 0]]).sum()
        draft.advance()
        if check is not None:
            draft.watch(check)
        target = batch.anchor_index + 1 + step
        counted = counted & batch.trained[target]
        rows = counted.nonzero()[:, 0]
        teacher, logits = batch.teacher[target[rows]], draft.logits(rows)
        q = torch.softmax(logits.float(), dim=-1)
        accepted = torch.minimum(q, teacher).sum(-1)
        statistics.add(counted, rows, accepted, teacher.gather(1, q.argmax(-1, keepdim=True))[:, 0])
        if objective.mask_top is not None:
            alive = _still_trained(alive, rows, logits, teacher, objective.mask_top)
        used = alive[rows] & batch.rejected[target[rows]] if objective.feedback_only else alive[rows]
        if objective.loss == LENGTH_LOSS:
            surrogate = (surrogate * (alive & counted)).index_put(
                (rows,), torch.where(used, surrogate[rows] * accepted, 0.0)
            )
            total = total - (surrogate * anchor_weights).sum()
            weight_sum = 1.0
        else:
            total = (
                total
                + objective.decay**step
                * (LOSSES[objective.loss](logits, teacher) * used * anchor_weights[rows]).sum()
            )
            weight_sum += objective.decay**step
    sampled, likeliest = (statistics.lengths * (drafting * anchor_weights)).sum(-1).tolist()
    return Unrolled(
        total / weight_sum,
        statistics.acceptance,
        statistics.likeliest,
        sampled,
        likeliest,
        _by_piece(statistics.lengths, batch.pieces, drafting),
    )


class _AcceptanceStatistics:
    """Accumulates acceptance over draft positions.

    Attributes:
        acceptance: Mean probability at each position that a sampled draft token is accepted.
        likeliest: Mean probability at each position that the drafter's likeliest token is accepted.
        lengths: float32 [2, N], expected acceptance length from each anchor: of sampled drafts in row 0, of
            drafts of likeliest tokens in row 1.
    """

    def __init__(self, anchors: int, device: torch.device) -> None:
        self.acceptance: list[float] = []
        self.likeliest: list[float] = []
        self.lengths = torch.ones(2, anchors, device=device)
        self._survival = torch.ones(2, anchors, device=device)  # probability that no token was rejected yet

    @torch.no_grad()
    def add(
        self, counted: torch.Tensor, rows: torch.Tensor, sampled: torch.Tensor, likeliest: torch.Tensor
    ) -> None:
        """Adds a draft position.

        Args:
            counted: bool [N], anchors that count at the position.
            rows: int64 [M], their indices.
            sampled: float32 [M], probability that a sampled draft token is accepted.
            likeliest: float32 [M], probability that the drafter's likeliest token is accepted.
        """
        self.acceptance.append(float(sampled.mean()) if len(rows) else 0.0)
        self.likeliest.append(float(likeliest.mean()) if len(rows) else 0.0)
        self._survival *= counted
        self._survival[:, rows] *= torch.stack([sampled, likeliest])
        self.lengths += self._survival


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
        self._attention = UnrolledAttention(
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
        self._hidden = self._model.step(embeds, self._hidden, (batch.positions + step)[None], self._attention)
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
            self._embed(tokens), self._hidden[:, rows], positions, self._attention.branch(rows)
        )
        return self._model.logits(hidden[0])


@torch.no_grad()
def _still_trained(
    alive: torch.Tensor, rows: torch.Tensor, logits: torch.Tensor, teacher: torch.Tensor, top: int
) -> torch.Tensor:
    """Returns bool [N], the anchors that stay in the loss.

    An anchor leaves it once the teacher's likeliest token is not among the drafter's ``top`` likeliest.

    Args:
        alive: bool [N], anchors still in the loss.
        rows: int64 [M], anchors that count at the current position.
        logits: float [M, W], the drafter's logits.
        teacher: float32 [M, W], the target's probabilities.
        top: Number of the drafter's likeliest tokens.
    """
    reachable = (logits.topk(min(top, logits.shape[1])).indices == teacher.argmax(-1, keepdim=True)).any(-1)
    remaining = torch.zeros_like(alive)
    remaining[rows] = alive[rows] & reachable
    return remaining
