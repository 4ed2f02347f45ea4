"""One optimizer step over packed micro-batches, with one gradient exchange."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from accelerate import Accelerator
from torch import nn

from rl.packing import PackedBatch, PromptRow, Sample, pack


def packed_step(
    accelerator: Accelerator,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Sequence[PackedBatch],
    loss_of: Callable[[PackedBatch], torch.Tensor],
    idle: Callable[[PackedBatch], torch.Tensor],
    grad_clip: float,
) -> float:
    """Accumulates gradients over this rank's micro-batches, exchanges them with the last, and steps where they are finite.

    Collective: a rank without a micro-batch takes part with one that counts for nothing.

    Args:
        accelerator: Of the run.
        model: What it wrapped.
        optimizer: What it wrapped.
        batches: This rank's.
        loss_of: A micro-batch's share of the mean over all ranks, times the number of ranks.
        idle: The model's output on a micro-batch, summed: something to take a gradient of.
        grad_clip: Norm that gradients are cut to.

    Returns:
        The gradient's norm before it was cut; not finite where the step was left out.
    """
    for number, batch in enumerate(batches or [None]):
        with _synchronised(accelerator, model, number >= len(batches) - 1):
            if batch is None:
                loss = idle(pack([PromptRow([0], (Sample(-1, [0]),))]).to(accelerator.device)) * 0.0
            else:
                loss = loss_of(batch)
            accelerator.backward(loss)
    norm = float(accelerator.clip_grad_norm_(model.parameters(), grad_clip))
    if torch.isfinite(torch.tensor(norm)):
        optimizer.step()
    # Kept, not dropped: the gradients are views of DDP's buckets, and fresh ones beside those would be a second copy.
    optimizer.zero_grad(set_to_none=False)
    return norm


def _synchronised(accelerator: Accelerator, model: nn.Module, last: bool) -> AbstractContextManager[None]:
    return nullcontext() if last else accelerator.no_sync(model)
