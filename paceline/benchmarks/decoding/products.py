"""Measures products with packed bfloat16 weights on a CPU, beside oneDNN, from 1 to 96 rows.

All weights of a SmolLM2-135M shape are multiplied in turn, so that they come from memory as in a decode step.
Each row's result is compared bit for bit with the same row computed alone.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from paceline.benchmarks.common.results import Results, machine
from paceline.rl.errors import UserError
from paceline.rl.process.console import console
from paceline.rl.process.invocation import command_line
from paceline.rl.process.process_tuning import fit_process
from paceline.rollout.native.build import instruction_set, runnable_instruction_sets
from paceline.rollout.native.products import PackedProducts, load_products

_LAYERS = 30
_LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))  # outputs, inputs
_HEAD = (49152, 576)
_ROWS = (1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96)

Product = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class ProductRow:
    """Holds the fastest of the passes over all weights with one number of rows.

    Attributes:
        rows: Number of rows.
        own_ms: Milliseconds of the project's products.
        onednn_ms: Milliseconds of oneDNN's.
        gigaflops: Operations per second of the project's products, in 10⁹.
        differing: Rows that are not, bit for bit, what they are alone.
        onednn_differing: Of oneDNN's rows, likewise.
    """

    rows: int
    own_ms: float
    onednn_ms: float
    gigaflops: float
    differing: int
    onednn_differing: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--repeats", type=int, default=7, help="passes over all weights; the fastest counts")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/products"), help="JSON file of the results"
    )


def run(args: argparse.Namespace) -> None:
    """Measures every number of rows and writes the results.

    Raises:
        UserError: There is no compiler, or oneDNN has no bfloat16 products here.
    """
    fit_process(local_world_size=1)
    products = load_products()
    if products is None or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise UserError("bench products: needs a C++ compiler, and a CPU for which oneDNN packs bfloat16")
    terminal = console()
    sets = {"kernels": instruction_set(), "runnable": runnable_instruction_sets()}
    with Results(args.out, command_line(), machine=machine(), instruction_sets=sets) as results:
        for row in measure_products(products, args.repeats):
            results.add("products", row)
            terminal.print(
                f"{row.rows:3d} rows: {row.own_ms:6.2f} ms, oneDNN {row.onednn_ms:6.2f} ms "
                f"({row.onednn_ms / row.own_ms:.2f}), {row.gigaflops:.0f} GFLOP/s; rows that differ from "
                f"themselves alone: {row.differing}, of oneDNN's {row.onednn_differing}"
            )


def measure_products(products: PackedProducts, repeats: int) -> list[ProductRow]:
    """Measures both products, one after the other at each number of rows."""
    torch.manual_seed(0)
    shapes = [*_LAYER * _LAYERS, _HEAD]
    weights = [torch.randn(shape).mul_(0.05).bfloat16() for shape in shapes]
    own = [products.pack(weight) for weight in weights]
    onednn = [torch.ops.mkldnn._reorder_linear_weight(weight, 1) for weight in weights]
    parameters = sum(weight.numel() for weight in weights)

    def multiply(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        return products.multiply(x, packed, None, None)

    def multiply_onednn(x: torch.Tensor, packed: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    rows = []
    for count in _ROWS:
        inputs = {width: torch.randn(1, count, width).bfloat16() for width in (576, 1536)}
        seconds = [
            _fastest(product, packed, shapes, inputs, repeats)
            for product, packed in ((multiply, own), (multiply_onednn, onednn))
        ]
        differing = [
            _differing(product, packed[: len(_LAYER)], shapes, inputs, count)
            for product, packed in ((multiply, own), (multiply_onednn, onednn))
        ]
        speed = 2 * parameters * count / seconds[0] / 1e9
        rows.append(ProductRow(count, seconds[0] * 1e3, seconds[1] * 1e3, speed, *differing))
    return rows


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
