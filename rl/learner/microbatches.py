"""Runs a function over packed micro-batches: one optimizer step, or one number per token of completions.

Modes of sharding that gather weights layer by layer need every rank to run the same number of forwards. Ranks
with fewer micro-batches then run dummy ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from accelerate import Accelerator

from paceline.rl.learner.packing import PackedBatch, PromptRow, Sample, pack, plan
from paceline.rl.sharding import TrainedModule


class Completion(Protocol):
    """A prompt with its completion: token ids, int64 [P] and int64 [L]."""

    @property
    def prompt(self) -> torch.Tensor:
        """The prompt's token ids, int64 [P]."""
        ...

    @property
    def completion(self) -> torch.Tensor:
        """The completion's token ids, int64 [L]."""
        ...


def packed_microbatches(
    samples: Sequence[Completion], chosen: Sequence[int], budget: int, device: torch.device
) -> Iterator[PackedBatch]:
    """Yields chosen samples in micro-batches, each prompt once with all of its samples.

    Args:
        samples: Prompts with their completions.
        chosen: Indices into ``samples``.
        budget: Approximate tokens of a micro-batch.
        device: Device of the micro-batches.
    """
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in chosen:
        groups.setdefault(tuple(samples[i].prompt.tolist()), []).append(i)
    rows = [
        PromptRow(prompt, tuple(Sample(i, samples[i].completion.tolist()) for i in members))
        for prompt, members in groups.items()
    ]
    for part in plan(rows, budget):
        yield pack(part).to(device)


def packed_step(
    accelerator: Accelerator,
    trained: TrainedModule,
    batches: Sequence[PackedBatch],
    loss_of: Callable[[PackedBatch], torch.Tensor],
    output_sum: Callable[[PackedBatch], torch.Tensor],
) -> float:
    """Accumulates gradients over this rank's micro-batches and takes an optimizer step if they are finite.

    Collective: a rank without a micro-batch takes part with a dummy one, whose gradient is zero.

    Args:
        accelerator: The run's accelerator.
        trained: The model with its optimizer.
        batches: This rank's micro-batches.
        loss_of: Returns a micro-batch's share of the mean over all ranks, times the number of ranks.
        output_sum: Returns the sum of the model's outputs on a micro-batch, for dummy backward passes.

    Returns:
        The gradient's norm before clipping; it is not finite where the step was skipped.
    """
    rounds = pad_to_lockstep(accelerator, trained, batches) or [None]
    for number, batch in enumerate(rounds):
        with trained.accumulating(number == len(rounds) - 1):
            loss = output_sum(dummy_batch(accelerator.device)) * 0.0 if batch is None else loss_of(batch)
            trained.backward(loss)
    return trained.step()


@torch.no_grad()
def token_outputs(
    output_of: Callable[[PackedBatch], torch.Tensor],
    samples: Sequence[Completion],
    chosen: Sequence[int],
    budget: int,
    accelerator: Accelerator,
    trained: TrainedModule | None = None,
) -> dict[int, torch.Tensor]:
    """Computes a number for each token of chosen completions, such as its log-prob or its value.

    Collective where ``trained`` runs in lockstep.

    Args:
        output_of: Returns float32 [M], one number for each target of a micro-batch; called under the run's
            autocast, without gradients.
        samples: Prompts with completions of at least one token.
        chosen: Indices into ``samples``.
        budget: Approximate tokens of a micro-batch.
        accelerator: The run's accelerator.
        trained: The model that ``output_of`` runs; None for a module that every rank holds whole.

    Returns:
        float32 [L_i] by index, on the accelerator's device.
    """
    outputs: dict[int, torch.Tensor] = {}
    batches = list(packed_microbatches(samples, chosen, budget, accelerator.device))
    for batch in batches if trained is None else pad_to_lockstep(accelerator, trained, batches):
        with accelerator.autocast():
            numbers = output_of(dummy_batch(accelerator.device) if batch is None else batch)
        for order, index in enumerate(batch.members if batch is not None else ()):
            assert batch is not None
            outputs[index] = numbers[batch.owner == order]
    return outputs


def pad_to_lockstep(
    accelerator: Accelerator, trained: TrainedModule, batches: Sequence[PackedBatch]
) -> list[PackedBatch | None]:
    """Appends None until all ranks have equally many micro-batches, where sharding needs that. Collective."""
    if not trained.in_lockstep:
        return list(batches)
    most = int(accelerator.gather(torch.tensor([len(batches)], device=accelerator.device)).max())
    return [*batches, *[None] * (most - len(batches))]


def dummy_batch(device: torch.device) -> PackedBatch:
    """Returns a micro-batch of one token, for a rank that has none left."""
    return pack([PromptRow([0], (Sample(-1, [0]),))]).to(device)
