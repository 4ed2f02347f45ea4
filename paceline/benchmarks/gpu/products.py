"""Measures a GPU's row-invariant products against torch's, and whether their rows depend on each other."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from paceline.benchmarks.common.results import Log
from paceline.benchmarks.decoding.model_shapes import SHAPES
from paceline.benchmarks.gpu.timing import seconds_of

_ROWS = (1, 8, 32, 128, 256)
_COLD_BYTES = 200 << 20  # weights that a product goes through in turn; more than a GPU caches

Layers = list[tuple[torch.Tensor, None]]


@dataclass(frozen=True, slots=True)
class ProductReport:
    """Holds the measurements of one product of a model shape, with weights that are not in a cache.

    Attributes:
        shape: Name of the shape.
        product: ``qkv``, ``o``, ``gate_up`` (with silu), ``down`` or ``head``.
        rows: Number of tokens.
        microseconds: Time of the product.
        torch: Time of torch's products, without silu.
        floor: Time in which the memory moves the weights.
        rows_differ: How many rows have other bits than the same row alone.
    """

    shape: str
    product: str
    rows: int
    microseconds: float
    torch: float
    floor: float
    rows_differ: int


def measure_products(shape: str, bandwidth: float, log: Log) -> list[ProductReport]:
    """Measures every product of a decode step in bfloat16.

    Args:
        shape: Name in `SHAPES`.
        bandwidth: Bytes per second that the device's memory moves.
        log: Receives a line for each product and number of tokens.
    """
    reports = []
    for name, (outputs, inputs) in products_of(SHAPES[shape]).items():
        size = 2 * inputs * sum(outputs)
        sets = [_layers(outputs, inputs) for _ in range(max(_COLD_BYTES // size, 2))]
        for rows in _ROWS:
            x = torch.randn(1, rows, inputs, device="cuda", dtype=torch.bfloat16)
            run = _ours(name == "gate_up")
            ours, theirs = (_microseconds(f, x, sets) for f in (run, _torch))
            alone = torch.cat([run(x[:, i : i + 1], sets[0]) for i in range(rows)], 1)
            differ = int((run(x, sets[0]) != alone).any(-1).sum())
            reports.append(ProductReport(shape, name, rows, ours, theirs, size / bandwidth * 1e6, differ))
            log(
                f"{shape}: {name} of {rows}: {ours:.1f} µs, torch {theirs:.1f}, at least "
                f"{reports[-1].floor:.1f}; {differ} rows depend on the others"
            )
    return reports


def products_of(shape: dict[str, Any]) -> dict[str, tuple[tuple[int, ...], int]]:
    """Returns the outputs of each layer and the inputs of a decode step's products."""
    hidden, wide, dim = shape["hidden_size"], shape["intermediate_size"], shape["head_dim"]
    heads, kv_heads = shape["num_attention_heads"] * dim, shape["num_key_value_heads"] * dim
    return {
        "qkv": ((heads, kv_heads, kv_heads), hidden),
        "o": ((hidden,), heads),
        "gate_up": ((wide, wide), hidden),
        "down": ((hidden,), wide),
        "head": ((shape["vocab_size"],), hidden),
    }


def _layers(outputs: tuple[int, ...], inputs: int) -> Layers:
    return [
        (torch.randn(n, inputs, device="cuda", dtype=torch.bfloat16) * inputs**-0.5, None) for n in outputs
    ]


def _ours(gated: bool) -> Callable[[torch.Tensor, Layers], torch.Tensor]:
    from paceline.rollout.native.triton_kernels import TritonKernels  # where there is Triton

    kernels = TritonKernels()
    return kernels.gate if gated else kernels.linear


def _torch(x: torch.Tensor, layers: Layers) -> None:
    for weight, _ in layers:
        torch.nn.functional.linear(x, weight)


def _microseconds(run: Callable[[torch.Tensor, Layers], Any], x: torch.Tensor, sets: list[Layers]) -> float:
    """Returns the mean time of a product over sets of weights in turn, replayed from a graph."""
    run(x, sets[0])
    torch.cuda.synchronize()
    graph, count = torch.cuda.CUDAGraph(), max(len(sets), 8)
    with torch.cuda.graph(graph):
        for layers in itertools.islice(itertools.cycle(sets), count):
            run(x, layers)
    return seconds_of(functools.partial(graph.replay)) / count * 1e6
