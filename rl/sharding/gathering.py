"""Whole weights of a module whose parameters may lie in parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def in_parts(module: nn.Module) -> bool:
    """Whether parameters are partitioned: by DeepSpeed's ZeRO 3, which marks them, or by ``fully_shard``,
    whose are `DTensor`s.
    """
    return any(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in module.parameters())


def whole(value: torch.Tensor) -> torch.Tensor:
    """A tensor from its parts. Collective where it has some."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def whole_parameters(module: nn.Module, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    """Parameters of the wanted names, whole, one after the other, good until the next step. Collective: all
    ranks go to the end.
    """
    for name, parameter in module.named_parameters():
        if not wanted(name):
            continue
        if hasattr(parameter, "ds_id"):
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([parameter]):
                found = parameter.detach().clone()  # taken apart again after it
            yield name, found
        else:
            yield name, whole(parameter.detach())


def in_buckets(
    weights: Iterable[tuple[str, torch.Tensor]], most_bytes: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Weights in lists of about ``most_bytes``: a list ends with the tensor that takes it past that."""
    bucket: list[tuple[str, torch.Tensor]] = []
    held = 0
    for name, tensor in weights:
        bucket.append((name, tensor))
        held += tensor.nbytes
        if held > most_bytes:
            yield bucket
            bucket, held = [], 0
    if bucket:
        yield bucket
