"""Redistributes a step's samples over ranks so that each rank has about the same compute in the update."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load, save

from paceline.rl.types import TrainingSample

_FIELDS = [f.name for f in fields(TrainingSample)]


def compute_cost(sample: TrainingSample, attention: float) -> float:
    """Estimates a sample's training cost in matmul FLOPs of one token; its shared prompt is not counted.

    Args:
        sample: A prompt with a completion of L tokens.
        attention: Cost of attending from one token to one other, in the same unit: hidden size × layers ÷
            parameters counts both products of causal attention.
    """
    length = len(sample.completion)
    return length * (1 + attention * (len(sample.prompt) + length))


def assign_ranks(costs: Sequence[Sequence[float]]) -> list[list[int]]:
    """Assigns samples to ranks so that each rank has about equal compute, moving as few as possible.

    The samples of all ranks form one line, which is cut into parts of equal cost. A part ends within one
    sample of its ideal end, and the samples of a prompt stay together unless a cut falls between them.

    Args:
        costs: The cost of each sample, by rank; 0 for samples that need no computation, which stay.

    Returns:
        The destination rank of each sample, by rank.
    """
    total = sum(map(sum, costs))
    ranks, passed = len(costs), 0.0
    assigned: list[list[int]] = []
    for rank, own in enumerate(costs):
        assigned.append([])
        for cost in own:
            share = (passed + cost / 2) / total if cost else 0.0
            assigned[-1].append(min(int(share * ranks), ranks - 1) if cost else rank)
            passed += cost
    return assigned


def redistribute(
    samples: Sequence[TrainingSample], costs: Sequence[float], accelerator: Accelerator
) -> list[TrainingSample]:
    """Returns this rank's share of all ranks' samples. Collective.

    Args:
        samples: The samples that this rank holds.
        costs: The cost of each sample, see `assign_ranks`.
        accelerator: The run's accelerator.
    """
    ranks, rank = accelerator.num_processes, accelerator.process_index
    if ranks == 1:
        return list(samples)
    destinations = assign_ranks(gather_object([list(costs)]))[rank]
    buffers = [
        b""
        if other == rank
        else _serialize([s for s, d in zip(samples, destinations, strict=True) if d == other])
        for other in range(ranks)
    ]
    kept = [s for s, destination in zip(samples, destinations, strict=True) if destination == rank]
    return [*kept, *(s for buffer in _all_to_all(buffers, accelerator) for s in _deserialize(buffer))]


def _all_to_all(buffers: list[bytes], accelerator: Accelerator) -> list[bytes]:
    """Sends buffer i to rank i. Returns the buffers that this rank received, by sender. Collective."""
    lengths = [len(buffer) for buffer in buffers]
    incoming = [of_rank[accelerator.process_index] for of_rank in gather_object([lengths])]
    joined = bytearray(b"".join(buffers)) or bytearray(1)  # torch.frombuffer refuses an empty one
    sent = torch.frombuffer(joined, dtype=torch.uint8)[: sum(lengths)]
    received = torch.empty(sum(incoming), dtype=torch.uint8, device=accelerator.device)
    torch.distributed.all_to_all_single(received, sent.to(accelerator.device), incoming, lengths)
    return [part.cpu().numpy().tobytes() for part in received.split(incoming)]


def _serialize(samples: Sequence[TrainingSample]) -> bytes:
    named = {
        f"{i}.{n}": getattr(s, n).contiguous()
        for i, s in enumerate(samples)
        for n in _FIELDS
        if getattr(s, n) is not None
    }
    return save(named) if named else b""


def _deserialize(buffer: bytes) -> list[TrainingSample]:
    by_sample: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in load(buffer).items() if buffer else ():
        index, _, column = name.partition(".")
        by_sample.setdefault(int(index), {})[column] = tensor
    return [TrainingSample(**by_sample[i]) for i in sorted(by_sample)]
