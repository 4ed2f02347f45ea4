"""Measures CUDA graphs, decode steps, verification and drafting on one GPU, with random weights.

Graph memory is measured naive and bucketed, step times with graphs and without, for a 1.5B and an 8B shape.
Needs torch and transformers only. Nothing is timed on a CPU.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from paceline.benchmarks.common.results import Log, Results
from paceline.rl.errors import UserError
from paceline.rl.process.invocation import command_line
from paceline.rollout.drafters.eagle3_model import Eagle3Model, eagle3_config
from paceline.rollout.drafters.eagle3_network import PaddedNetwork
from paceline.rollout.model.attention import chain_seats
from paceline.rollout.model.graph_plan import naive_bytes, plan_graphs, plan_keys, powers_of_two
from paceline.rollout.model.graph_pool import CudaCapturer, GraphPool
from paceline.rollout.model.kv_cache import CacheShape, SlotCache
from paceline.rollout.model.runner import MOST_ROWS, ModelRunner, default_tap_layers

SHAPES: dict[str, dict[str, Any]] = {
    "1.5B": {
        "hidden_size": 1536,
        "intermediate_size": 8960,
        "num_hidden_layers": 28,
        "num_attention_heads": 12,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "vocab_size": 151936,
    },
    "8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 128256,
    },
}
STRATEGIES = (16, 24, 32, 48, 64)  # tokens to verify per sequence, as in TLT
BATCHES = powers_of_two(32)
_CONTEXT, _SPAN_TOKENS = 512, 640


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument(
        "--shapes", nargs="+", default=["1.5B", "8B"], choices=["1.5B", "8B"], help="model shapes"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/gpu"), help="JSON file of the results"
    )


def run(args: argparse.Namespace) -> None:
    """Measures each shape on the GPU and prints graph memory and the cost of drafting.

    Raises:
        UserError: No CUDA device is visible.
    """
    if not torch.cuda.is_available():
        raise UserError("bench.py gpu: no CUDA device is visible; run it on a machine with one")
    with Results(args.out, command_line(), device=device()) as results:
        for shape in args.shapes:
            report = measure(shape, _print)
            results.add("reports", report)
            for name, value in report.graph_memory.items():
                _print(f"{shape}: {name}: {f'{value / 1e6:.0f} MB' if value > 1000 else f'{value:.3f}'}")
            for batch, milliseconds, share in report.drafter:
                _print(
                    f"{shape}: a draft step at batch {batch}: {milliseconds:.2f} ms, {share:.1%} of a decode "
                    "step"
                )


def _print(line: str) -> None:
    print(line, flush=True)


@dataclass(slots=True)
class GpuReport:
    """Holds the measurements of one model shape.

    Attributes:
        shape: Name of the shape.
        graph_memory: Bytes of graphs, planned and used, bucketed and naive, and two ratios of them.
        steps: Tuples of batch size, tokens per sequence, eager milliseconds, and milliseconds with graphs or
            None.
        verification: Tuples of batch size, tokens per sequence, and time relative to one token.
        drafter: Tuples of batch size, milliseconds of a draft step, and its share of a target decode step.
        fallbacks: Reasons why shapes were not captured, with their counts.
    """

    shape: str
    graph_memory: dict[str, float] = field(default_factory=dict)
    steps: list[tuple[int, int, float, float | None]] = field(default_factory=list)
    verification: list[tuple[int, int, float]] = field(default_factory=list)
    drafter: list[tuple[int, float, float]] = field(default_factory=list)
    fallbacks: dict[str, int] = field(default_factory=dict)


def random_model(shape: str, device: str) -> PreTrainedModel:
    """Returns a Llama model with random bfloat16 weights."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, tie_word_embeddings=False)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def measure(shape: str, log: Log) -> GpuReport:
    """Measures one shape on the current CUDA device."""
    report = GpuReport(shape)
    model = random_model(shape, "cuda")
    taps = default_tap_layers(model.config.num_hidden_layers)
    runner = ModelRunner(
        model, dtype=torch.bfloat16, slots=BATCHES[-1], capacity=_SPAN_TOKENS, tap_layers=taps
    )
    runner.cache.reserve(_SPAN_TOKENS, active=0, slots=BATCHES[-1])
    eager = _step_times(runner, plan_widths())
    _graph_memory(runner, report)
    graphs = _step_times(runner, plan_widths())
    for (batch, tokens), seconds in eager.items():
        captured = runner.graphs is not None and any(
            k.batch == batch and k.tokens >= tokens for k in runner.graphs.replays
        )
        report.steps.append((batch, tokens, seconds * 1e3, graphs[batch, tokens] * 1e3 if captured else None))
        report.verification.append((batch, tokens, graphs[batch, tokens] / graphs[batch, 1]))
        log(
            f"{shape}: batch {batch}, {tokens} tokens: eager {seconds * 1e3:.2f} ms, graph "
            f"{graphs[batch, tokens] * 1e3:.2f} ms"
        )
    _drafter(model, runner, taps, graphs, report)
    assert runner.graphs is not None
    report.fallbacks = dict(runner.graphs.fallbacks)
    return report


def plan_widths() -> tuple[int, ...]:
    """Returns the numbers of tokens per sequence that forwards are timed with, up to the widest strategy."""
    return (1, 2, 4, 8, *STRATEGIES)


def _step_times(runner: ModelRunner, widths: tuple[int, ...]) -> dict[tuple[int, int], float]:
    times = {}
    for batch in BATCHES:
        for width in widths:
            if width > 1 and batch * width > MOST_ROWS:
                continue
            tokens = torch.zeros(batch, width, dtype=torch.long, device="cuda")
            starts = [_CONTEXT] * batch
            times[batch, width] = _seconds(functools.partial(runner.decode, tokens, [width] * batch, starts))
    return times


def _seconds(run: Callable[[], Any]) -> float:
    """Returns the mean seconds of a call, by CUDA events, over enough calls for a tenth of a second."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    count = max(int(0.1 / (time.perf_counter() - begin)), 3)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(count):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / count / 1e3


def _used() -> int:
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def _pool(runner: ModelRunner, widths: tuple[int, ...], max_rows: int) -> GraphPool:
    keys = plan_keys("target", BATCHES, widths, (runner.cache.span,), max_rows)
    return GraphPool(
        lambda tokens, seats, _, span: (runner.decode_rectangle(tokens, seats, span), None),
        plan_graphs(runner.shape, keys),
        vocab=runner.vocab_size,
        dtype=torch.bfloat16,
        device=runner.cache.device,
        capturer=CudaCapturer(),
    )


@torch.no_grad()
def _graph_memory(runner: ModelRunner, report: GpuReport) -> None:
    """Measures the bytes of the naive graphs, then of the bucketed ones, which stay in use."""
    planned_naive = naive_bytes(runner.shape, STRATEGIES, BATCHES, runner.cache.span)
    before = _used()
    naive = []
    for tokens in STRATEGIES:
        naive.append(_pool(runner, (tokens,), BATCHES[-1] * tokens))
        naive[-1].capture_planned()
    naive_used = _used() - before
    del naive
    before = _used()
    runner.graphs = _pool(runner, (1, 2, 4, 8, *STRATEGIES), MOST_ROWS)
    runner.graphs.capture_planned()
    used = _used() - before
    planned = runner.graphs.plan.total_bytes
    report.graph_memory = {
        "bucketed planned": planned,
        "bucketed used": used,
        "naive planned": planned_naive,
        "naive used": naive_used,
        "planned ÷ used": planned / max(used, 1),
        "bucketed ÷ naive used": used / max(naive_used, 1),
    }


@torch.no_grad()
def _drafter(
    model: PreTrainedModel,
    runner: ModelRunner,
    taps: tuple[int, ...],
    graphs: dict[tuple[int, int], float],
    report: GpuReport,
) -> None:
    config = eagle3_config(model.config, 32000, taps)
    with torch.device("cuda"):
        weights = Eagle3Model(config, torch.arange(32000)).to(torch.bfloat16)
    head_dim, kv_heads = runner.shape.head_dim, runner.shape.kv_heads
    cache = SlotCache(
        CacheShape(1, kv_heads, head_dim, BATCHES[-1], _SPAN_TOKENS, 0, torch.bfloat16), runner.cache.device
    )
    cache.reserve(_SPAN_TOKENS, active=0, slots=BATCHES[-1])
    network = PaddedNetwork(weights, model.get_input_embeddings(), cache)
    network.capture_graphs(CudaCapturer(), precapture=True)
    for batch in BATCHES:
        tokens = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
        hidden = torch.zeros(batch, 1, model.config.hidden_size, dtype=torch.bfloat16, device="cuda")
        seats = chain_seats(torch.full_like(tokens, _CONTEXT))
        seconds = _seconds(functools.partial(network.step, tokens, hidden, seats, [0] * batch))
        report.drafter.append((batch, seconds * 1e3, seconds / graphs[batch, 1]))


def device() -> dict[str, str]:
    """Returns the name of the GPU and the torch version, for the results."""
    return {"name": torch.cuda.get_device_name(), "torch": torch.__version__}
