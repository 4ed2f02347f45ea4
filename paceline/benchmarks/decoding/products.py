"""Measures the engine's products on a CPU, beside torch's, from 1 to 96 rows, in bfloat16 and in float32.

In bfloat16 weights are packed, and torch's side is oneDNN with weights that it has packed, or products in
float32 on processors where oneDNN has none in bfloat16; in float32 both multiply by the trainer's weights as
they lie. All weights of a SmolLM2-135M shape are multiplied in turn, so that they come from memory as in a
decode step. Each row's result is compared bit for bit with the same row computed alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from paceline.benchmarks.common.results import Results, machine
from paceline.rl.errors import UserError
from paceline.rl.process.console import console
from paceline.rl.process.invocation import command_line
from paceline.rl.process.process_tuning import fit_process, multiplies_bfloat16
from paceline.rollout.native.build import instruction_set, runnable_instruction_sets
from paceline.rollout.native.products import (
    DotProducts,
    PackedProducts,
    load_dot_products,
    load_products,
)

_LAYERS = 30
_LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # outputs, inputs
_HEAD = (49152, 576)
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96)

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class ProductRow:
    """Holds the fastest of the passes over all weights with one number of rows.

    Attributes:
        dtype: Dtype of weights and inputs.
        rows: Number of rows.
        own_ms: Milliseconds of the project's products.
        torch_ms: Milliseconds of torch's.
        gigaflops: Operations per second of the project's products, in 10⁹.
        differing: Rows that are not, bit for bit, what they are alone.
        torch_differing: Of torch's rows, likewise.
    """

    dtype: str
    rows: int
    own_ms: float
    torch_ms: float
    gigaflops: float
    differing: int
    torch_differing: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--repeats", type=int, default=7, help="passes over all weights; the fastest counts")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/products"), help="JSON file of the results"
    )


def run(args: argparse.Namespace) -> None:
    """Measures every number of rows and writes the results.

    Raises:
        UserError: There is no compiler.
    """
    fit_process(local_world_size=1)
    products, dots = load_products(), load_dot_products("cpu", torch.float32)
    if products is None or dots is None:
        raise UserError("bench products: needs a C++ compiler: install g++")
    terminal = console()
    sets = {"kernels": instruction_set(), "runnable": runnable_instruction_sets()}
    pairs = {torch.bfloat16: _packed_pair(products), torch.float32: _plain_pair(dots)}
    with Results(args.out, command_line(), machine=machine(), instruction_sets=sets) as results:
        for row in measure_products(pairs, args.repeats):
            results.add("products", row)
            terminal.print(
                f"{row.dtype} {row.rows:3d} rows: {row.own_ms:6.2f} ms, torch {row.torch_ms:6.2f} ms "
                f"({row.torch_ms / row.own_ms:.2f}), {row.gigaflops:.0f} GFLOP/s; rows that differ from "
                f"themselves alone: {row.differing}, of torch's {row.torch_differing}"
            )


@dataclass(frozen=True, slots=True)
class _Side:
    """One side of a comparison: how it lays weights out, and how it multiplies by them."""

    pack: Callable[[torch.Tensor], torch.Tensor]
    multiply: Product


def _packed_pair(products: PackedProducts) -> tuple[_Side, _Side]:
    """Returns the bfloat16 products of the project and of torch."""
    own = _Side(products.pack, lambda x, packed: products.multiply(x, packed, None, None))
    if not multiplies_bfloat16(torch.device("cpu")):
        linear = torch.nn.functional.linear
        return own, _Side(torch.Tensor.float, lambda x, weight: linear(x.float(), weight).bfloat16())
    theirs = _Side(
        lambda weight: torch.ops.mkldnn._reorder_linear_weight(weight, 1),
        lambda x, packed: torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], ""),
    )
    return own, theirs


def _plain_pair(dots: DotProducts) -> tuple[_Side, _Side]:
    """Returns the products with weights as they lie of the project and of torch."""
    own = _Side(lambda weight: weight, lambda x, weight: dots.multiply(x, [(weight, None)]))
    return own, _Side(lambda weight: weight, torch.nn.functional.linear)


def measure_products(pairs: Mapping[torch.dtype, tuple[_Side, _Side]], repeats: int) -> Iterator[ProductRow]:
    """Yields each number of rows, with both sides measured one after the other.

    Args:
        pairs: The project's products and torch's, by dtype.
        repeats: Passes over all weights; the fastest counts.
    """
    torch.manual_seed(0)
    shapes = [*_LAYER * _LAYERS, _HEAD]
    for dtype, sides in pairs.items():
        weights = [torch.randn(shape).mul_(0.05).to(dtype) for shape in shapes]
        parameters = sum(weight.numel() for weight in weights)
        packed = [[side.pack(weight) for weight in weights] for side in sides]
        for count in _ROWS:
            inputs = {width: torch.randn(1, count, width).to(dtype) for width in (576, 1536)}
            seconds = [
                _fastest(side.multiply, w, shapes, inputs, repeats)
                for side, w in zip(sides, packed, strict=True)
            ]
            differing = [
                _differing(side.multiply, w[: len(_LAYER)], shapes, inputs, count)
                for side, w in zip(sides, packed, strict=True)
            ]
            speed = 2 * parameters * count / seconds[0] / 1e9
            name = str(dtype).removeprefix("torch.")
            yield ProductRow(name, count, seconds[0] * 1e3, seconds[1] * 1e3, speed, *differing)


def _fastest(
    product: Product,
    packed: list[torch.Tensor],
    shapes: list[tuple[int, int]],
    inputs: dict[int, torch.Tensor],
    repeats: int,
) -> float:
    """Returns the seconds of the fastest pass over all weights."""
    best = float("inf")
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        for (_, width), weight in zip(shapes, packed, strict=True):
            product(inputs[width], weight)
        best = min(best, time.perf_counter() - begin)
    return best


def _differing(
    product: Product,
    packed: list[torch.Tensor],
    shapes: list[tuple[int, int]],
    inputs: dict[int, torch.Tensor],
    count: int,
) -> int:
    """Returns how many rows differ in a bit, in any of the products, from the row computed alone."""
    same = torch.ones(count, dtype=torch.bool)
    for (_, width), weight in zip(shapes, packed, strict=False):
        x = inputs[width]
        alone = [product(x[:, row : row + 1].contiguous(), weight)[0, 0] for row in range(count)]
        same &= (torch.stack(alone) == product(x, weight)[0]).all(-1)
    return int((~same).sum())
