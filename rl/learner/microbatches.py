"""One optimizer step over packed micro-batches, with one gradient exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from accelerate import Accelerator

from paceline.rl.learner.packing import PackedBatch, PromptRow, Sample, pack
from paceline.rl.sharding import Trained


def packed_step(
    accelerator: Accelerator,
    trained: Trained,
    batches: Sequence[PackedBatch],
    loss_of: Callable[[PackedBatch], torch.Tensor],
    idle: Callable[[PackedBatch], torch.Tensor],
) -> float:
    """Accumulates gradients over this rank's micro-batches, and steps where they are finite.

    Collective: a rank without a micro-batch, or with fewer than others where they run in lockstep, takes part
        with ones that count
    for nothing.

    Args:
        accelerator: Of the run.
        trained: The model with its optimizer.
        batches: This rank's.
        loss_of: A micro-batch's share of the mean over all ranks, times the number of ranks.
        idle: The model's output on a micro-batch, summed: something to take a gradient of.

    Returns:
        The gradient's norm before it was cut; not finite where the step was left out.
    """
    rounds = in_step(accelerator, trained, batches) or [None]
    for number, batch in enumerate(rounds):
        with trained.accumulating(number == len(rounds) - 1):
            loss = idle(counts_for_nothing(accelerator.device)) * 0.0 if batch is None else loss_of(batch)
            trained.backward(loss)
    return trained.step()


def in_step(
    accelerator: Accelerator, trained: Trained, batches: Sequence[PackedBatch]
) -> list[PackedBatch | None]:
    """A rank's micro-batches; where every rank must run as many, followed by None up to the largest number of
    any. Collective.
    """
    if not trained.in_lockstep:
        return list(batches)
    most = int(accelerator.gather(torch.tensor([len(batches)], device=accelerator.device)).max())
    return [*batches, *[None] * (most - len(batches))]


def counts_for_nothing(device: torch.device) -> PackedBatch:
    """A micro-batch of one token, for a rank that has none left."""
    return pack([PromptRow([0], (Sample(-1, [0]),))]).to(device)
