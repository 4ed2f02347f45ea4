"""What the drafter is trained for, and the statistics of one pass over a batch."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Objective:
    """What the drafter is trained for.

    Attributes:
        loss: Name of a loss in `LOSSES`, or ``length``: minus the expected acceptance length of the whole
            draft, over all positions at once.
        unroll: Number of draft positions, each fed with the drafter's output at the one before.
        decay: Weight of each position relative to the one before; ``length`` ignores it.
        mask_top: Number of the drafter's likeliest tokens that must include the target's likeliest. Where
            they do not, the draft position and all later ones of that anchor are left out of the loss
            (GRIFFIN, arXiv 2502.11018). None leaves nothing out.
        feedback_only: Whether to train only where verification rejected a draft, on the target's distribution
            there (online speculative decoding, arXiv 2310.07177).
        on_policy: Loss weight of the second draft position after the drafter's own rejected tokens, for which
            verification has already computed the target's distribution (DistillSpec, arXiv 2310.08461, trains
            on the drafter's own outputs).
        parallel: Number of positions that are trained to be drafted in one pass, the first of which every
            draft shares; 0 trains none.
        retained: Share of the anchors at each position of such drafts, relative to the one before, that
            are trained on (`retained_shares`).
    """

    loss: str = "fkl"
    unroll: int = 3
    decay: float = 0.8
    mask_top: int | None = None
    feedback_only: bool = False
    on_policy: float = 0.0
    parallel: int = 0
    retained: float = 0.7

    @property
    def positions(self) -> int:
        """The number of tokens after an anchor that are drafted in any way."""
        return max(self.unroll, self.parallel)


@dataclass(frozen=True, slots=True)
class Unrolled:
    """The loss and acceptance statistics of one pass over a batch.

    Attributes:
        loss: Scalar loss.
        acceptance: Σ_y min(p, q) at each draft position, the probability that a sampled draft token is
            accepted; mean over the position's anchors.
        likeliest: p(argmax q) at each draft position, the probability that the drafter's likeliest token is
            accepted; mean over the position's anchors.
        parallel_acceptance: Σ_y min(p, q) at each position of drafts in one pass; empty if there are none.
        length: Expected number of tokens that one verification of sampled drafts commits, 1 + E[Σ_i Π_{j≤i}
            acceptance_j]. It is the mean over both kinds of drafts if several positions of both are drafted.
        likeliest_length: Expected number of tokens that one verification of likeliest-token drafts commits.
        by_piece: float32 [2, P], ``length`` and ``likeliest_length`` of each piece; NaN for a piece in which
            nothing can be drafted.
    """

    loss: torch.Tensor
    acceptance: list[float]
    likeliest: list[float]
    parallel_acceptance: list[float]
    length: float
    likeliest_length: float
    by_piece: torch.Tensor


class Interrupted(Exception):
    """An update was interrupted; the weights have not changed."""
