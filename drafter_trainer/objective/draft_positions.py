"""Adds up loss and acceptance over the positions of drafts."""

from __future__ import annotations

import copy

import torch

from paceline.drafter_trainer.objective.draft_objective import Objective
from paceline.drafter_trainer.objective.losses import LENGTH_LOSS, LOSSES
from paceline.drafter_trainer.packing import DraftBatch


class DraftPositions:
    """Adds up the loss and the acceptance of drafts from all anchors, one position after another.

    Args:
        batch: The batch.
        objective: Loss and its options.

    Attributes:
        drafting: bool [N], anchors from which drafting can start.
        anchor_weights: float32 [N], the anchors' shares of the loss.
        counted: bool [N], anchors whose text is long enough for the positions so far, and where the target's
            distributions are known.
        total: Weighted sum of the losses.
        weight: Sum of the positions' weights.
        acceptance: Mean probability at each position that a sampled draft token is accepted.
        likeliest: Mean probability at each position that the drafter's likeliest token is accepted.
        lengths: float32 [2, N], expected acceptance length from each anchor: of sampled drafts in row 0, of
            drafts of likeliest tokens in row 1.
    """

    def __init__(self, batch: DraftBatch, objective: Objective) -> None:
        self._batch, self._objective = batch, objective
        self.drafting = self.counted = batch.trained[batch.anchor_index]
        self.anchor_weights = batch.weights / batch.weights[self.drafting].sum().clamp(min=1e-8)
        self.total, self.weight = batch.taps.new_zeros(()), 0.0
        self.acceptance: list[float] = []
        self.likeliest: list[float] = []
        device, anchors = batch.anchor_index.device, len(batch.anchor_index)
        self.lengths = torch.ones(2, anchors, device=device)
        self._survival = torch.ones(2, anchors, device=device)  # probability that no token was rejected yet
        self._alive = self.drafting  # anchors that `Objective.mask_top` has left in the loss
        self._product = torch.ones(anchors, device=device)  # of acceptances, with gradient

    def fork(self) -> DraftPositions:
        """Returns a copy for drafts that share the positions so far and then differ; its loss starts at 0."""
        other = copy.copy(self)
        other.total, other.weight = torch.zeros_like(self.total), 0.0
        other.acceptance, other.likeliest = list(self.acceptance), list(self.likeliest)
        other.lengths, other._survival = self.lengths.clone(), self._survival.clone()
        return other

    def advance(self, step: int) -> torch.Tensor:
        """Leaves out anchors whose text ends before position ``step``; returns the others, int64 [M]."""
        self.counted = self.counted & self._batch.trained[self._batch.anchor_index + 1 + step]
        return self.counted.nonzero()[:, 0]

    def add(self, step: int, rows: torch.Tensor, logits: torch.Tensor, share: float = 1.0) -> None:
        """Adds a position.

        Args:
            step: Index of the position.
            rows: int64 [M], the anchors that are drafted from.
            logits: float [M, W], the drafter's logits.
            share: Probability with which each of the position's anchors is among ``rows``. The loss is
                divided by it, so that its expectation is that of all anchors.
        """
        target = self._batch.anchor_index[rows] + 1 + step
        teacher, objective = self._batch.teacher[target], self._objective
        q = torch.softmax(logits.float(), dim=-1)
        accepted = torch.minimum(q, teacher).sum(-1)
        self._count(rows, accepted, teacher.gather(1, q.argmax(-1, keepdim=True))[:, 0])
        if objective.mask_top is not None:
            self._alive = _still_trained(self._alive, rows, logits, teacher, objective.mask_top)
        used = self._alive[rows]
        if objective.feedback_only:
            used = used & self._batch.rejected[target]
        if objective.loss == LENGTH_LOSS:
            product = torch.where(used, self._product[rows] * accepted, 0.0)
            self._product = torch.zeros_like(self._product).index_put((rows,), product)
            self.total = self.total - (self._product * self.anchor_weights).sum() / share
            self.weight = 1.0
            return
        weight = objective.decay**step
        losses = LOSSES[objective.loss](logits, teacher) * used * self.anchor_weights[rows]
        self.total = self.total + weight / share * losses.sum()
        self.weight += weight

    @torch.no_grad()
    def _count(self, rows: torch.Tensor, sampled: torch.Tensor, likeliest: torch.Tensor) -> None:
        """Adds the acceptance of a position.

        Args:
            rows: int64 [M], the anchors that are drafted from.
            sampled: float32 [M], probability that a sampled draft token is accepted.
            likeliest: float32 [M], probability that the drafter's likeliest token is accepted.
        """
        self.acceptance.append(float(sampled.mean()) if len(rows) else 0.0)
        self.likeliest.append(float(likeliest.mean()) if len(rows) else 0.0)
        accepted = torch.zeros_like(self._survival)
        accepted[:, rows] = torch.stack([sampled, likeliest])
        self._survival *= accepted
        self.lengths += self._survival


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
