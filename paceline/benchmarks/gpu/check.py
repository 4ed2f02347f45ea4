"""Checks and measures the engine on one GPU in minutes, with torch, transformers and triton alone.

Runs the GPU tests, compares captured graphs and their memory with the plan, times products against torch's,
decode steps against the memory's bandwidth and plain decoding against transformers' generate with a static
cache, counts how often a step waits for the GPU, measures the update, and trains a small reasoner with a
drafter to see what speculation gains. Each check is a line that says whether it passed; the measurements go
to one JSON file. Nothing is timed on a CPU.
"""

from __future__ import annotations

import argparse
import functools
import gc
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch

from paceline.benchmarks.common.results import Results
from paceline.benchmarks.decoding.model_shapes import SHAPES
from paceline.benchmarks.gpu.products import ProductReport, measure_products
from paceline.benchmarks.gpu.reasoner import ReasonerReport, measure_reasoner
from paceline.benchmarks.gpu.shapes import ShapeReport, measure_shape
from paceline.benchmarks.gpu.timing import seconds_of
from paceline.benchmarks.gpu.update import UpdateReport, measure_update
from paceline.rl.errors import UserError
from paceline.rl.process.invocation import command_line

_ROOT = Path(__file__).parents[3]
_TESTS = (
    "tests/rollout/test_gpu.py",
    "tests/rollout/test_gpu_rows.py",
    "tests/rollout/native/test_triton_kernels.py",
    "tests/rl/learner/test_packed_attention.py",
    "tests/drafter_trainer/objective/test_unrolled_attention.py",
    "tests/drafter_trainer/test_teacher.py",
)
_COPIED = 1 << 30  # values of the copy that measures the bandwidth
_MATRIX = 8192
_MOST_SYNCS = {"plain": 1.0, "eagle3:3": 2.0, "eagle3:4x4/7": 3.0}
_ADMISSION = 0.2  # syncs of admitting sequences, spread over the steps that are counted
_PARTS = ("tests", "products", "shapes", "update", "reasoner")


@dataclass(frozen=True, slots=True)
class Check:
    """The outcome of one check.

    Attributes:
        name: What was checked.
        passed: Whether it passed.
        value: What was found.
    """

    name: str
    passed: bool
    value: str


@dataclass(frozen=True, slots=True)
class Card:
    """The GPU and what it can do.

    Attributes:
        name: Its name.
        torch: Version of torch.
        bandwidth: Bytes per second that a large copy reads and writes.
        arithmetic: Operations per second of a large bfloat16 matrix product.
    """

    name: str
    torch: str
    bandwidth: float
    arithmetic: float


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--parts", nargs="+", default=list(_PARTS), choices=_PARTS, help="what to check")
    parser.add_argument(
        "--shapes", nargs="+", default=["1.5B", "8B"], choices=sorted(SHAPES), help="model shapes"
    )
    parser.add_argument(
        "--seconds", type=float, default=40, help="training of the reasoner, and of its drafter"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/gpu"), help="JSON file of the results"
    )


def run(args: argparse.Namespace) -> None:
    """Runs the checks, prints a line for each and writes the results.

    Raises:
        UserError: No CUDA device is visible.
        SystemExit: A check failed.
    """
    if not torch.cuda.is_available():
        raise UserError("gpu-check: no CUDA device is visible; run it on a machine with one")
    begin = time.perf_counter()
    with Results(args.out, command_line(), device=torch.cuda.get_device_name()) as results:
        checks: list[Check] = []

        def note(*found: Check) -> None:
            for check in found:
                checks.append(check)
                results.add("checks", check)
                _print(f"{'pass' if check.passed else 'FAIL'}  {check.name}: {check.value}")

        card = measure_card()
        results.put("card", [card])
        _print(f"{card.name}: {card.bandwidth / 1e12:.2f} TB/s, {card.arithmetic / 1e12:.0f} TFLOP/s")
        if "tests" in args.parts:
            note(*run_tests())
        for shape in args.shapes:
            if "products" in args.parts:
                products = measure_products(shape, card.bandwidth, _print)
                for product in products:
                    results.add("products", product)
                note(*product_checks(shape, products))
            if "shapes" in args.parts:
                report = measure_shape(shape, card.bandwidth, shape == "1.5B", _print)
                results.add("shapes", report)
                note(*shape_checks(report))
            _release_memory()
        if "update" in args.parts:
            update = measure_update(card.arithmetic, _print)
            results.put("update", [update])
            note(*update_checks(update))
            _release_memory()
        if "reasoner" in args.parts:
            reasoner = measure_reasoner(args.seconds, _print)
            results.put("reasoner", [reasoner])
            note(*reasoner_checks(reasoner))
        results.note(seconds=round(time.perf_counter() - begin, 1))
    failed = sum(not check.passed for check in checks)
    _print(f"{len(checks) - failed} of {len(checks)} checks passed; results: {args.out}")
    if failed:
        raise SystemExit(1)


def _release_memory() -> None:
    gc.collect()
    torch.cuda.empty_cache()


def _print(line: str) -> None:
    print(line, flush=True)


def measure_card() -> Card:
    """Measures the bandwidth of the memory and the speed of a matrix product."""
    left, right = (torch.randn(_MATRIX, _MATRIX, device="cuda").bfloat16() for _ in range(2))
    product = seconds_of(functools.partial(torch.matmul, left, right))
    # the product's workspace stays, and within these buffers' memory would keep torch from returning it
    source = torch.empty(_COPIED, dtype=torch.bfloat16, device="cuda")
    target = torch.empty_like(source)
    copied = seconds_of(functools.partial(target.copy_, source))
    del source, target
    torch.cuda.empty_cache()
    return Card(
        torch.cuda.get_device_name(), torch.__version__, 4 * _COPIED / copied, 2 * _MATRIX**3 / product
    )


def run_tests() -> list[Check]:
    """Runs the GPU tests and those of the kernels; nothing where the source tree or pytest is missing."""
    files = [_ROOT / name for name in _TESTS]
    if not all(file.is_file() for file in files):
        return []
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *map(str, files)],
        capture_output=True,
        text=True,
        check=False,
        cwd=_ROOT,
    )
    lines = ended.stdout.strip().splitlines() or ended.stderr.strip().splitlines() or [""]
    failed = [line for line in lines if line.startswith("FAILED")]
    return [Check("tests", ended.returncode == 0, "; ".join([*failed, lines[-1]]))]


def shape_checks(report: ShapeReport) -> list[Check]:
    """Returns the checks of one shape."""
    shape, graphs = report.shape, report.graphs
    share = graphs["planned bytes"] / max(graphs["used bytes"], 1)
    slowest = max(ms / floor for _, width, ms, floor in report.steps if width == 1)
    fastest = min(ms / floor for _, width, ms, floor in report.steps if width == 1)
    wide = {(b, w): ms for b, w, ms, _ in report.steps}
    chains = [(draft, forward) for name, _, draft, forward, *_ in report.parts if name == "eagle3:3"]
    checks = [
        Check(
            f"{shape} graphs",
            graphs["captured"] == graphs["planned"] and not report.fallbacks,
            f"{graphs['captured']:.0f} of {graphs['planned']:.0f} captured, fallbacks {report.fallbacks}",
        ),
        Check(
            f"{shape} memory of graphs",
            0.9 <= share <= 1.1,
            f"{graphs['planned bytes'] / 1e6:.0f} MB planned, {graphs['used bytes'] / 1e6:.0f} MB used",
        ),
        Check(
            f"{shape} decode step",
            slowest <= 3.0,
            f"{fastest:.2f} to {slowest:.2f} times what reading weights and keys takes",
        ),
        Check(
            f"{shape} verification",
            wide[1, 8] <= 1.5 * wide[1, 1],
            f"8 tokens cost {wide[1, 8] / wide[1, 1]:.2f} times one at batch 1, "
            f"{wide[32, 8] / wide[32, 1]:.2f} times at batch 32",
        ),
        Check(
            f"{shape} drafting",
            all(draft <= 0.5 * forward for draft, forward in chains),
            "a chain of three takes "
            + ", ".join(f"{d / f:.2f}" for d, f in chains)
            + " forwards at 1, 8, 32",
        ),
        Check(
            f"{shape} memory of the engine",
            0.9 <= report.memory["planned"] / report.memory["used"] <= 1.1,
            f"{report.memory['planned'] / 1e9:.2f} GB planned, {report.memory['used'] / 1e9:.2f} GB used",
        ),
    ]
    for strategy, count in report.syncs.items():
        most = _MOST_SYNCS[strategy] + _ADMISSION
        checks.append(Check(f"{shape} syncs, {strategy}", count <= most, f"{count:.2f} a step"))
    for batch, speed, static in report.plain:
        if static is not None:
            value = f"{speed:.0f} tokens/s, {speed / static:.2f} times generate with a static cache"
            checks.append(Check(f"{shape} plain, batch {batch}", speed >= static, value))
    return checks


def product_checks(shape: str, reports: Sequence[ProductReport]) -> list[Check]:
    """Returns the checks of one shape's products."""
    few = [r for r in reports if r.rows <= 32]
    slowest = max(r.microseconds / r.torch for r in few)
    differ = sum(r.rows_differ for r in reports)
    return [
        Check(f"{shape} products", slowest <= 1.0, f"at most {slowest:.2f} times torch's up to 32 tokens"),
        Check(f"{shape} rows of products", differ == 0, f"{differ} rows depend on the others"),
    ]


def update_checks(report: UpdateReport) -> list[Check]:
    """Returns the checks of the update."""
    return [
        Check(
            "update, speed",
            report.share >= 0.3,
            f"{report.tokens / report.seconds:.0f} tokens/s, {report.share:.0%} of the card's operations",
        ),
        Check(
            "update, memory of activations",
            0.9 <= report.planned / report.used <= 1.1,
            f"{report.planned / 1e9:.2f} GB planned, {report.used / 1e9:.2f} GB used",
        ),
    ]


def reasoner_checks(report: ReasonerReport) -> list[Check]:
    """Returns the checks of the small reasoner."""
    checks = [
        Check(
            "reasoner drafter",
            report.acceptance_length >= 2,
            f"acceptance length {report.acceptance_length:.2f}, {report.right:.0%} of the sums right",
        )
    ]
    speeds = {(batch, strategy): mean(rounds) for batch, strategy, rounds in report.speeds}
    for batch in sorted({batch for batch, _ in speeds}):
        plain, chain, adaptive = (speeds[batch, name] for name in ("plain", "eagle3:3", "adaptive"))
        value = (
            f"{adaptive / plain:.2f} times plain ({plain:.0f} tokens/s), chains of three {chain / plain:.2f}"
        )
        checks.append(Check(f"reasoner adaptive, batch {batch}", adaptive >= 0.97 * plain, value))
    return checks
