"""Numbers for whole completions, a packed micro-batch at a time."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import torch
from accelerate import Accelerator

from rl.packing import PackedBatch, PromptRow, Sample, pack, plan


class Completion(Protocol):
    """What is needed of a sample: token ids, and the group of samples whose prompt it shares."""

    @property
    def prompt(self) -> Sequence[int]: ...
    @property
    def completion(self) -> Sequence[int]: ...
    @property
    def group(self) -> str: ...


def micro_batches(samples: Sequence[Completion], chosen: Sequence[int], budget: int, device: torch.device) -> Iterator[PackedBatch]:
    """Chosen samples, each prompt once with its samples, in micro-batches of about ``budget`` tokens."""
    groups: dict[str, list[int]] = {}
    for i in chosen:
        groups.setdefault(samples[i].group, []).append(i)
    rows = [
        PromptRow(samples[members[0]].prompt, tuple(Sample(i, samples[i].completion) for i in members))
        for members in groups.values()
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
) -> dict[int, torch.Tensor]:
    """A number for each token of chosen samples, such as its log-prob or its value.

    Args:
        score: float32 [M] of a micro-batch's targets; called under the run's autocast, without gradients.
        samples: Of at least one token each.
        chosen: Indices.
        budget: Tokens of a micro-batch.
        accelerator: Of the run.

    Returns:
        float32 [L_i] by sample, on the accelerator's device.
    """
    found: dict[int, torch.Tensor] = {}
    for batch in micro_batches(samples, chosen, budget, accelerator.device):
        with accelerator.autocast():
            numbers = score(batch)
        for order, index in enumerate(batch.members):
            found[index] = numbers[batch.owner == order]
    return found
