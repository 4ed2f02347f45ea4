"""Gathers full weights of a module whose parameters may be partitioned."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from torch.distributed.tensor import DTensor


def is_partitioned(module: nn.Module) -> bool:
    """Returns whether a module's parameters are partitioned.

    DeepSpeed's ZeRO 3 marks such parameters, and those of ``fully_shard`` are `DTensor`s.
    """
    return any(hasattr(p, "ds_id") or isinstance(p, DTensor) for p in module.parameters())


def full_tensor(value: torch.Tensor) -> torch.Tensor:
    """Returns a full tensor from its partitions. Collective if the tensor is partitioned."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def full_parameters(module: nn.Module, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields full parameters one after the other; they are valid until the next step.

    Collective: every rank must exhaust the iterator.

    Args:
        module: The module.
        wanted: Function that says whether a name is wanted.
    """
    for name, parameter in module.named_parameters():
        if not wanted(name):
            continue
        if hasattr(parameter, "ds_id"):
            from deepspeed.runtime.zero import GatheredParameters

            with GatheredParameters([parameter]):
                gathered = parameter.detach().clone()  # the parameter is partitioned again on exit
            yield name, gathered
        else:
            yield name, full_tensor(parameter.detach())


def in_buckets(
    weights: Iterable[tuple[str, torch.Tensor]], most_bytes: int
) -> Iterator[list[tuple[str, torch.Tensor]]]:
    """Yields weights in lists of about ``most_bytes``.

    A list ends with the tensor that makes it exceed that size.
    """
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
