"""A step's samples, spread over the ranks so that each has as much to compute: whoever decoded long ones does
not update alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import load, save

from paceline.rl.types import TrainingSample

_NAMES = [f.name for f in fields(TrainingSample)]


def compute_cost(sample: TrainingSample, attention: float) -> float:
    """What a sample's forward and backward take, in tokens' worth of matrix products, its prompt aside.

    Args:
        sample: Of L tokens.
        attention: Of a token to one other, likewise: hidden size × layers ÷ parameters counts both products
            of attention, causal.
    """
    length = len(sample.completion)
    return length * (1 + attention * (len(sample.prompt) + length))


def homes(costs: Sequence[Sequence[float]]) -> list[list[int]]:
    """To which rank each sample goes: the samples of all ranks, in line, cut into parts of equal cost.

    A part ends within one sample of where it should, samples of a prompt stay together but where a cut falls
    between them, and what need not move does not.

    Args:
        costs: Of each rank's samples; 0 for those that need not be computed.
    """
    total = sum(map(sum, costs))
    ranks, passed = len(costs), 0.0
    found: list[list[int]] = []
    for rank, own in enumerate(costs):
        found.append([])
        for cost in own:
            share = (passed + cost / 2) / total if cost else 0.0
            found[-1].append(min(int(share * ranks), ranks - 1) if cost else rank)
            passed += cost
    return found


def spread(
    samples: Sequence[TrainingSample], costs: Sequence[float], accelerator: Accelerator
) -> list[TrainingSample]:
    """This rank's share of all ranks' samples. Collective.

    Args:
        samples: This rank's own.
        costs: Of each, see `homes`.
        accelerator: Of the run.
    """
    ranks, rank = accelerator.num_processes, accelerator.process_index
    if ranks == 1:
        return list(samples)
    own = homes(gather_object([list(costs)]))[rank]
    parcels = [
        b"" if home == rank else _wrap([s for s, h in zip(samples, own, strict=True) if h == home])
        for home in range(ranks)
    ]
    stay = [s for s, home in zip(samples, own, strict=True) if home == rank]
    return [*stay, *(s for parcel in _exchange(parcels, accelerator) for s in _unwrap(parcel))]


def _exchange(parcels: list[bytes], accelerator: Accelerator) -> list[bytes]:
    """Hands parcel i to rank i; what came from each."""
    sizes = gather_object([[len(p) for p in parcels]])
    coming = [of_rank[accelerator.process_index] for of_rank in sizes]
    sent = torch.frombuffer(bytearray(b"".join(parcels)) or bytearray(1), dtype=torch.uint8)[
        : sum(map(len, parcels))
    ]
    received = torch.empty(sum(coming), dtype=torch.uint8, device=accelerator.device)
    torch.distributed.all_to_all_single(
        received, sent.to(accelerator.device), coming, [len(p) for p in parcels]
    )
    return [part.cpu().numpy().tobytes() for part in received.split(coming)]


def _wrap(samples: Sequence[TrainingSample]) -> bytes:
    named = {
        f"{i}.{n}": getattr(s, n).contiguous()
        for i, s in enumerate(samples)
        for n in _NAMES
        if getattr(s, n) is not None
    }
    return save(named) if named else b""


def _unwrap(parcel: bytes) -> list[TrainingSample]:
    by_sample: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in load(parcel).items() if parcel else ():
        index, _, column = name.partition(".")
        by_sample.setdefault(int(index), {})[column] = tensor
    return [TrainingSample(**by_sample[i]) for i in sorted(by_sample)]
