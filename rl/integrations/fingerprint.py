"""Detects whether weights have changed, by their contents.

Counters and versions miss writes: a trainer's step does not change when a checkpoint is loaded, and a
tensor's version does not change when code writes through ``.data`` or into DeepSpeed's flat buffer. Reading
all weights misses nothing and costs less than refreshing the engine's copies (docs/trl.md has the numbers).
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
_LANES = 1 << 20  # number of multipliers, and of elements that one pass on a device hashes


def fingerprint(tensors: Iterable[torch.Tensor]) -> Fingerprint:
    """Returns dtype, shape and a digest of each tensor's bytes.

    The digest is xxHash (XXH3, 128 bits) on the CPU. On other devices, where copying the weights to the CPU
    would cost more, it is a multilinear hash modulo 2^64 (Carter and Wegman, 1979) with fixed random
    multipliers.
    """
    digests = [(t.dtype, t.shape, _digest(t.detach())) for t in tensors]
    # int() waits for a device, so it comes after all hashes have been launched
    return tuple((dtype, shape, int(digest)) for dtype, shape, digest in digests)


def tensors_held(module: nn.Module) -> Iterator[torch.Tensor] | None:
    """Returns the parameters and buffers that this rank holds, which are shards if the model is sharded.

    Args:
        module: Model, possibly sharded by FSDP2 or ZeRO 3.

    Returns:
        The tensors; None if some are not in memory (ZeRO-Infinity keeps them on a disk).
    """
    held = []
    for tensor in chain(module.parameters(), module.buffers()):
        held.append(tensor.to_local() if isinstance(tensor, DTensor) else tensor)
        shard = getattr(tensor, "ds_tensor", None)  # ZeRO 3 gathers the parameter from these shards
        if shard is not None:
            if shard.numel() != getattr(shard, "ds_numel", shard.numel()):
                return None
            held.append(shard)
    return iter(held)


def _digest(tensor: torch.Tensor) -> int | torch.Tensor:
    flat = tensor.contiguous().reshape(-1).view(torch.uint8)
    return (
        int(xxhash.xxh3_128_intdigest(flat.numpy().data))
        if flat.device.type == "cpu"
        else multilinear_hash(flat)
    )


def multilinear_hash(data: torch.Tensor) -> torch.Tensor:
    """Hashes bytes on their device: the sum of 32-bit words, each multiplied by a fixed random number.

    Args:
        data: uint8 tensor [n]; single bytes are used as words if n or the offset is not a multiple of 4.

    Returns:
        Scalar int64 tensor on the same device.
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
    values = torch.randint(-(2**63), 2**63 - 1, (_LANES,), generator=generator)
    return (values | 1).to(device)
