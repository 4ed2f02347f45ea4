"""Log-probs of whole completions, a packed micro-batch at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import nn

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
def completion_logprobs(
    model: nn.Module,
    samples: Sequence[Completion],
    chosen: Sequence[int],
    *,
    accelerator: Accelerator,
    budget: int,
    temperature: float,
) -> dict[int, torch.Tensor]:
    """Log-probs of chosen samples' tokens, by sample.

    Args:
        model: An unwrapped `rl.log_probs.PolicyLogProbs`.
        samples: Of at least one token each.
        chosen: Indices.
        accelerator: Of the run.
        budget: Tokens of a micro-batch.
        temperature: Of the rollouts.

    Returns:
        float32 [L_i] each, on the accelerator's device.
    """
    found: dict[int, torch.Tensor] = {}
    for batch in micro_batches(samples, chosen, budget, accelerator.device):
        with accelerator.autocast():
            logprobs, _ = model(batch, temperature)
        for order, index in enumerate(batch.members):
            found[index] = logprobs[batch.owner == order]
    return found
