"""One GPU in one command: graph memory, step times, the price of verifying, and the drafter's, for random
weights.

Needs torch and transformers only. Nothing here is timed on a CPU.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from paceline.rollout.drafters.eagle3_model import Eagle3Model, eagle3_config
from paceline.rollout.drafters.eagle3_network import PaddedNetwork
from paceline.rollout.model.attention import chain_seats
from paceline.rollout.model.graph_plan import ModelShape, naive_bytes, plan_graphs, plan_keys, powers_of_two
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
STRATEGIES = (16, 24, 32, 48, 64)
BATCHES = powers_of_two(32)
_CONTEXT, _SPAN_TOKENS = 512, 640


@dataclass(slots=True)
class GpuReport:
    """What one shape gave.

    Attributes:
        shape: Name.
        graph_memory: Bytes planned and measured, bucketed and naive.
        steps: (batch, tokens, eager ms, graph ms or None).
        verification: (batch, tokens, time ÷ that of one token).
        drafter: (batch, ms of a draft step, share of a target decode step).
        fallbacks: Reasons why shapes were not captured.
    """

    shape: str
    graph_memory: dict[str, float] = field(default_factory=dict)
    steps: list[tuple[int, int, float, float | None]] = field(default_factory=list)
    verification: list[tuple[int, int, float]] = field(default_factory=list)
    drafter: list[tuple[int, float, float]] = field(default_factory=list)
    fallbacks: dict[str, int] = field(default_factory=dict)


def random_model(shape: str, device: str) -> PreTrainedModel:
    """A Llama of random bfloat16 weights."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, tie_word_embeddings=False)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def planned(shape: str, span: int = 2048) -> tuple[int, int, int]:
    """Graphs, their planned bytes, and the naive ones' for a shape, TLT's strategies and batches; nothing is
    captured.
    """
    sizes = SHAPES[shape]
    model = ModelShape(
        layers=sizes["num_hidden_layers"],
        hidden=sizes["hidden_size"],
        intermediate=sizes["intermediate_size"],
        heads=sizes["num_attention_heads"],
        kv_heads=sizes["num_key_value_heads"],
        head_dim=sizes["head_dim"],
        vocab=sizes["vocab_size"],
    )
    plan = plan_graphs(model, plan_keys("target", BATCHES, (1, *STRATEGIES), (span,), MOST_ROWS))
    return len(plan.keys), plan.total_bytes, naive_bytes(model, STRATEGIES, BATCHES, span)


def measure(shape: str, say: Callable[[str], None]) -> GpuReport:
    """All measurements of one shape, on the present CUDA device."""
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
        say(
            f"{shape}: batch {batch}, {tokens} tokens: eager {seconds * 1e3:.2f} ms, graph "
            f"{graphs[batch, tokens] * 1e3:.2f} ms"
        )
    _drafter(model, runner, taps, graphs, report)
    assert runner.graphs is not None
    report.fallbacks = dict(runner.graphs.fallbacks)
    return report


def plan_widths() -> tuple[int, ...]:
    """Tokens of a sequence in a forward: one, and what the strategies verify."""
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
    """Mean over enough runs for a tenth of a second, by CUDA events."""
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
    """Bytes of the naive graphs, then of the bucketed ones, which stay in use."""
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
    """The GPU that was measured, for the results."""
    return {"name": torch.cuda.get_device_name(), "torch": torch.__version__}
