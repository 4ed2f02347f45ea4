"""Training-time test: the drafter is trained on its own outputs, as it will run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

from paceline.drafter_trainer.losses import LOSSES
from paceline.drafter_trainer.packing import DraftBatch
from paceline.rollout.drafters.eagle3_model import Attend, Eagle3Model, attention_shape

LENGTH_LOSS = "length"


@dataclass(frozen=True, slots=True)
class Objective:
    """What the drafter is trained for.

    Attributes:
        loss: A name in `LOSSES`, or ``length``: the expected acceptance length of the whole draft, over all
            positions at once.
        unroll: Draft positions.
        decay: Weight of each position relative to the one before; ``length`` has no use for it.
        mask_top: A draft position whose likeliest token under the target is not among the drafter's so many
            likeliest is hopeless
            for now: it and what would follow are left out (GRIFFIN, arXiv 2502.11018). None leaves nothing
                out.
        feedback_only: Learn only where verification refused a draft, from what it gave instead (online
            speculative decoding, arXiv 2310.07177).
        on_policy: Weight of the second draft position after the drafter's own refused tokens: verification
            has computed what the target says there (DistillSpec, arXiv 2310.08461, trains on the drafter's
            own words).
    """

    loss: str = "fkl"
    unroll: int = 3
    decay: float = 0.8
    mask_top: int | None = None
    feedback_only: bool = False
    on_policy: float = 0.0


@dataclass(frozen=True, slots=True)
class Unrolled:
    """One pass over a batch.

    Attributes:
        loss: Scalar.
        acceptance: For each draft position Σ_y min(p, q): how often a drawn token is accepted, mean over its
            anchors.
        likeliest: For each draft position p(argmax q): how often the drafter's likeliest token is.
        length: Tokens a verification of drawn drafts would commit, 1 + E[Σ_i Π_{j≤i} acceptance_j].
        likeliest_length: The same of likeliest drafts.
        by_piece: float32 [2, P], both lengths of each piece; NaN where nothing can be drafted.
    """

    loss: torch.Tensor
    acceptance: list[float]
    likeliest: list[float]
    length: float
    likeliest_length: float
    by_piece: torch.Tensor


class Interrupted(Exception):
    """An update was broken off; weights are as they were."""


def unrolled_loss(
    model: Eagle3Model,
    embed_tokens: nn.Module,
    batch: DraftBatch,
    objective: Objective,
    check: Callable[[], None] | None = None,
) -> Unrolled:
    """Loss over several draft positions, each fed with the output of the one before (EAGLE-3, arXiv
    2503.01840, section 3.2, figure 6).

    At position m, an anchor attends to the real features of anchors up to its own and to its own positions 1
    … m, as a draft started there does. Only anchors from the prompt's last token on count, where drafting can
    start.

    Args:
        model: The drafter.
        embed_tokens: The target's input embedding, frozen.
        batch: From `pack`.
        objective: What to train for.
        check: Called at every draft position of the forward, and again of the backward pass; may raise
            `Interrupted`.
    """
    anchors = len(batch.at)
    counted = batch.trained[batch.at]
    anchor_weights = batch.weights / batch.weights[counted].sum().clamp(min=1e-8)
    alive = counted.clone()
    total = batch.taps.new_zeros(())
    weighing = 0.0
    running = torch.ones(2, anchors, device=batch.at.device)  # of drawn and of likeliest drafts
    lengths = torch.ones(2, anchors, device=batch.at.device)
    drafting = counted.clone()
    surrogate = torch.ones(anchors, device=batch.at.device)
    acceptance, likeliest = [], []
    draft = _Unroll(model, embed_tokens, batch)
    for step in range(objective.unroll):
        if step == 1 and objective.on_policy > 0 and len(batch.aside):
            values = LOSSES[objective.loss](draft.logits_aside(), batch.aside_teacher)
            total = total + objective.on_policy * (values * anchor_weights[batch.aside[:, 0]]).sum()
        draft.advance()
        if check is not None:
            draft.watch(check)
        target = batch.at + 1 + step
        counted = counted & batch.trained[target]
        rows = counted.nonzero()[:, 0]
        teacher, logits = batch.teacher[target[rows]], draft.logits(rows)
        q = torch.softmax(logits.float(), dim=-1)
        kept = torch.minimum(q, teacher).sum(-1)
        with torch.no_grad():
            best = teacher.gather(1, q.argmax(-1, keepdim=True))[:, 0]
            acceptance.append(float(kept.mean()) if len(rows) else 0.0)
            likeliest.append(float(best.mean()) if len(rows) else 0.0)
            running *= counted
            running[:, rows] *= torch.stack([kept.detach(), best])
            lengths += running
            if objective.mask_top is not None:
                alive = _without_hopeless(alive, rows, logits, teacher, objective.mask_top)
        used = alive[rows] & batch.refused[target[rows]] if objective.feedback_only else alive[rows]
        if objective.loss == LENGTH_LOSS:
            surrogate = (surrogate * (alive & counted)).index_put(
                (rows,), torch.where(used, surrogate[rows] * kept, 0.0)
            )
            total = total - (surrogate * anchor_weights).sum()
            weighing = 1.0
        else:
            total = (
                total
                + objective.decay**step
                * (LOSSES[objective.loss](logits, teacher) * used * anchor_weights[rows]).sum()
            )
            weighing += objective.decay**step
    drawn, top = (lengths * (drafting * anchor_weights)).sum(-1).tolist()
    return Unrolled(
        total / weighing, acceptance, likeliest, drawn, top, _by_piece(lengths, batch.pieces, drafting)
    )


def _by_piece(values: torch.Tensor, pieces: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Means of values [2, N] over the counted anchors of each piece."""
    count = int(pieces.max()) + 1
    sums = values.new_zeros(2, count).index_add_(1, pieces, values * counted)
    return sums / values.new_zeros(count).index_add_(0, pieces, counted.to(values))


class _Unroll:
    """The drafter's passes over a batch: each feeds the next."""

    def __init__(self, model: Eagle3Model, embed_tokens: nn.Module, batch: DraftBatch) -> None:
        self._model, self._embed_tokens, self._batch = model, embed_tokens, batch
        self._hidden = model.fc(batch.taps)[None]
        self._attention = _UnrolledAttention(batch.attends(), attention_shape(model.config)[2] ** -0.5)
        self._step = 0

    def _embed(self, tokens: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self._embed_tokens(tokens)[None].to(self._hidden.dtype)

    def advance(self) -> None:
        """One draft position further, along the text."""
        batch, step = self._batch, self._step
        embeds = self._embed(batch.tokens[batch.at + 1 + step])
        self._hidden = self._model.step(embeds, self._hidden, (batch.positions + step)[None], self._attention)
        self._step += 1

    def watch(self, check: Callable[[], None]) -> None:
        """Calls ``check`` now, and when the backward pass comes by."""
        check()
        if self._hidden.requires_grad:
            self._hidden.register_hook(lambda _: check())

    def logits(self, rows: torch.Tensor) -> torch.Tensor:
        """[M, W] of anchors int64 [M] at the present position."""
        return self._model.logits(self._hidden[0, rows])

    def logits_aside(self) -> torch.Tensor:
        """[D, W] one position further, after the refused tokens instead of the text's."""
        rows, tokens = self._batch.aside.unbind(1)
        positions = (self._batch.positions[rows] + self._step)[None]
        hidden = self._model.step(
            self._embed(tokens), self._hidden[:, rows], positions, self._attention.aside(rows)
        )
        return self._model.logits(hidden[0])


def _without_hopeless(
    alive: torch.Tensor, rows: torch.Tensor, logits: torch.Tensor, teacher: torch.Tensor, top: int
) -> torch.Tensor:
    hopeful = (logits.topk(min(top, logits.shape[1])).indices == teacher.argmax(-1, keepdim=True)).any(-1)
    kept = torch.zeros_like(alive)
    kept[rows] = alive[rows] & hopeful
    return kept


class _UnrolledAttention:
    """Keeps position 0's keys (the real features, attended causally within their piece) and, for each later
    position, one key for each anchor.
    """

    def __init__(self, attends: torch.Tensor, scaling: float) -> None:
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._scaling = scaling
        self._hidden = ~attends

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        self._keys.append(_repeated(key, query))
        self._values.append(_repeated(value, query))
        return self._attend(query, self._hidden, self._keys, self._values)

    def aside(self, rows: torch.Tensor) -> Attend:
        """Attention of some anchors whose next key is another than what will be kept."""

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            keys = [self._keys[0], *(k[:, :, rows] for k in self._keys[1:]), _repeated(key, query)]
            values = [self._values[0], *(v[:, :, rows] for v in self._values[1:]), _repeated(value, query)]
            return self._attend(query, self._hidden[rows], keys, values)

        return attend

    def _attend(
        self, query: torch.Tensor, hidden: torch.Tensor, keys: list[torch.Tensor], values: list[torch.Tensor]
    ) -> torch.Tensor:
        query = query * self._scaling
        scores = (query @ keys[0].transpose(-1, -2)).masked_fill(hidden, float("-inf"))
        own = [(query * k).sum(-1, keepdim=True) for k in keys[1:]]
        weights = torch.softmax(torch.cat([scores, *own], dim=-1), dim=-1)
        anchors = scores.shape[-1]
        out = weights[..., :anchors] @ values[0]
        for step, v in enumerate(values[1:]):
            out = out + weights[..., anchors + step, None] * v
        return out.transpose(1, 2)


def _repeated(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Keys or values [B, KV, L, d] for each of the query's heads."""
    return x.repeat_interleave(query.shape[1] // x.shape[1], dim=1)
