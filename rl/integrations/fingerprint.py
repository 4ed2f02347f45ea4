"""Whether weights are still the same: decided by their contents, whoever wrote them and however.

Counters and versions miss writes: a trainer's step does not move when a checkpoint is loaded, and a tensor's
    version does not move
when somebody writes through ``.data``, or into the flat buffer that DeepSpeed keeps it in. Reading all
weights misses nothing and costs less than renewing the engine's copies (docs/trl.md has the numbers).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import lru_cache
from itertools import chain

import torch
import xxhash
from torch import nn
from torch.distributed.tensor import DTensor

Fingerprint = tuple[tuple[torch.dtype, torch.Size, int], ...]
_LANES = 1 << 20  # multipliers, and elements that one pass on a device reads


def fingerprint(tensors: Iterable[torch.Tensor]) -> Fingerprint:
    """Returns dtype, shape and a digest of each tensor's bytes: xxHash (XXH3, 128 bits) on the CPU;
    elsewhere, where copying the weights to the CPU would cost more, a multilinear hash modulo 2^64 (Carter
    and Wegman, 1979) with fixed random multipliers.
    """
    found = [(t.dtype, t.shape, _digest(t.detach())) for t in tensors]
    # waits for the devices once all are asked
    return tuple((dtype, shape, int(digest)) for dtype, shape, digest in found)


def tensors_held(module: nn.Module) -> Iterator[torch.Tensor] | None:
    """Returns the parameters and buffers that this rank holds, its parts where they lie in parts; None where
    some of them are not in memory (ZeRO-Infinity's, on a disk).
    """
    held = []
    for tensor in chain(module.parameters(), module.buffers()):
        held.append(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
        part = getattr(tensor, "ds_tensor", None)  # ZeRO 3: what is gathered from
        if part is not None:
            if part.numel() != getattr(part, "ds_numel", part.numel()):
                return None
            held.append(part)
    return iter(held)


def _digest(tensor: torch.Tensor) -> int | torch.Tensor:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return (
        int(xxhash.xxh3_128_intdigest(flat.numpy().data))
        if flat.device.type == "cpu"
        else multilinear_hash(flat)
    )


def multilinear_hash(data: torch.Tensor) -> torch.Tensor:
    """Hashes uint8 [n] on its device: each 32 bits times a multiplier of their own, summed. Returns a scalar
    int64.
    """
    aligned = data.numel() % 4 == 0 and data.storage_offset() % 4 == 0
    lanes = data.view(torch.int32) if aligned else data
    multipliers = _multipliers(data.device)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for part in lanes.split(_LANES):
        total = total * multipliers[-1] + (part.long() * multipliers[: len(part)]).sum()
    return total


@lru_cache
def _multipliers(device: torch.device) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(-(2**63), 2**63 - 1, (_LANES,), generator=generator)
    return (drawn | 1).to(device)
