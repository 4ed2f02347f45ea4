"""Numbers for whole completions, a packed micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from accelerate import Accelerator

from paceline.rl.learner.microbatches import counts_for_nothing, in_step
from paceline.rl.learner.packing import PackedBatch, PromptRow, Sample, pack, plan
from paceline.rl.sharding import Trained


class Completion(Protocol):
    """What is needed of a sample: token ids, int64 [P] and [L]."""

    @property
    def prompt(self) -> torch.Tensor: ...
    @property
    def completion(self) -> torch.Tensor: ...


def micro_batches(
    samples: Sequence[Completion], chosen: Sequence[int], budget: int, device: torch.device
) -> Iterator[PackedBatch]:
    """Chosen samples, each prompt once with its samples, in micro-batches of about ``budget`` tokens."""
    groups: dict[tuple[int, ...], list[int]] = {}
    for i in chosen:
        groups.setdefault(tuple(samples[i].prompt.tolist()), []).append(i)
    rows = [
        PromptRow(prompt, tuple(Sample(i, samples[i].completion.tolist()) for i in members))
        for prompt, members in groups.items()
    ]
    for part in plan(rows, budget):
        yield pack(part).to(device)


@torch.no_grad()
def by_completion(
    score: Callable[[PackedBatch], torch.Tensor],
    samples: Sequence[Completion],
    chosen: Sequence[int],
    budget: int,
    accelerator: Accelerator,
    trained: Trained | None = None,
) -> dict[int, torch.Tensor]:
    """A number for each token of chosen samples, such as its log-prob or its value. Collective where
    ``trained`` runs in lockstep.

    Args:
        score: float32 [M] of a micro-batch's targets; called under the run's autocast, without gradients.
        samples: Of at least one token each.
        chosen: Indices.
        budget: Tokens of a micro-batch.
        accelerator: Of the run.
        trained: What ``score`` is a forward of, unless it is of a module that this rank has to itself.

    Returns:
        float32 [L_i] by sample, on the accelerator's device.
    """
    found: dict[int, torch.Tensor] = {}
    batches = list(micro_batches(samples, chosen, budget, accelerator.device))
    for batch in batches if trained is None else in_step(accelerator, trained, batches):
        with accelerator.autocast():
            numbers = score(counts_for_nothing(accelerator.device) if batch is None else batch)
        for order, index in enumerate(batch.members if batch is not None else ()):
            assert batch is not None
            found[index] = numbers[batch.owner == order]
    return found
