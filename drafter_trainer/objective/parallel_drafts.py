"""Trains drafts in one pass: all positions after the first read a mask in place of token and features."""

from __future__ import annotations

import torch
from torch import nn

from paceline.drafter_trainer.objective.draft_objective import Objective
from paceline.drafter_trainer.objective.draft_positions import DraftPositions
from paceline.drafter_trainer.objective.unrolled_attention import UnrolledAttention
from paceline.drafter_trainer.packing import DraftBatch
from paceline.rollout.drafters.eagle3_model import Eagle3Model

LEAST_RETAINED = 0.2  # PARD's lower bound


def retained_shares(objective: Objective) -> list[float]:
    """Returns the share of the anchors that is trained on at each position after the first.

    Conditional drop (PARD, arXiv 2504.18583, section 3.2): far positions are hard to predict and alike for
    neighbouring anchors, so they are trained on a share r^m of the anchors, but on a fifth at least.
    """
    return [max(objective.retained**step, LEAST_RETAINED) for step in range(1, objective.parallel)]


def add_parallel_drafts(
    model: Eagle3Model,
    embed_tokens: nn.Module,
    batch: DraftBatch,
    objective: Objective,
    positions: DraftPositions,
    attention: UnrolledAttention,
    draw: torch.Generator | None,
) -> None:
    """Adds positions 1, 2, … of drafts in one pass to ``positions``, which has their first one.

    Source: P-EAGLE (arXiv 2602.01469): at position m ≥ 1 the drafter reads the embedding of a mask token and
    a learned vector in place of the target's features, and attends to the real features up to the anchor and
    to the draft's own positions 1 … m. No position reads another's output, so one pass computes them all.

    Args:
        model: The drafter; it has a mask.
        embed_tokens: The target's input embedding, frozen.
        batch: Batch from `pack`.
        objective: Loss and its options.
        positions: Sums of the drafts' loss and acceptance.
        attention: Attention that has read position 0, and nothing after it.
        draw: Random numbers that choose the anchors at each position. An anchor stays up to some position, so
            that what its last position attends to is there. None takes all anchors.
    """
    assert model.mask_token is not None, "the drafter has no mask"
    chance = None if draw is None else torch.rand(len(batch.anchor_index), generator=draw)
    shares = retained_shares(objective) if chance is not None else [1.0] * (objective.parallel - 1)
    kept: list[torch.Tensor] = []
    for step, share in enumerate(shares, 1):
        rows = positions.advance(step)
        kept.append(rows if chance is None else rows[(chance < share).to(rows.device)[rows]])
    counts = [len(rows) for rows in kept]
    rows = torch.cat(kept)
    if not len(rows):
        return
    with torch.no_grad():
        token = torch.full((1, len(rows)), model.mask_token, device=rows.device)
        embeds = embed_tokens(token).to(batch.taps.dtype)
    hidden = model.fc(model.mask_hidden)[None].expand(-1, len(rows), -1)
    steps = torch.repeat_interleave(torch.arange(1, 1 + len(kept)), torch.tensor(counts)).to(rows.device)
    out = model.step(embeds, hidden, (batch.positions[rows] + steps)[None], attention.at_once(kept))
    logits = model.logits(out[0]).split(counts)
    for step, share in enumerate(shares, 1):
        positions.add(step, kept[step - 1], logits[step - 1], share)
