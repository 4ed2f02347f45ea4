"""Measures the engine on one GPU with random weights: graphs, memory, decode steps, drafting, and a peer."""

from __future__ import annotations

import functools
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from paceline.benchmarks.common.results import Log
from paceline.benchmarks.decoding.model_shapes import BATCHES, SHAPES, random_model
from paceline.benchmarks.gpu.timing import seconds_of
from paceline.rollout import Request, RolloutEngine, SamplingParams, default_tap_layers
from paceline.rollout.drafters import Eagle3Drafter, SuffixDrafter
from paceline.rollout.drafters.draft_graphs import drafter_graph_bytes
from paceline.rollout.drafters.eagle3 import fixed_taps
from paceline.rollout.drafters.eagle3_model import Eagle3Model, eagle3_config, parameter_count
from paceline.rollout.drafters.eagle3_native import draft_shape
from paceline.rollout.graphs.graph_plan import MOST_ROWS
from paceline.rollout.graphs.graph_pool import CudaCapturer
from paceline.rollout.model.kv_cache import CacheShape
from paceline.rollout.model.runner import ModelRunner
from paceline.rollout.strategy import Strategy

_CONTEXT, _CAPACITY = 512, 1024
_WIDTHS = (1, 2, 4, 8, 16, 32)  # tokens per sequence of the forwards that are timed
_DRAFT_VOCABULARY = 32000
_PROMPT, _COMPLETION = 64, 128  # tokens
_KV_BYTES = 8 << 30
_STEPS_OF_SYNCS, _STEPS_OF_PARTS = 24, 48
STEP_STRATEGIES = ("plain", "eagle3:3", "eagle3:4x4/7")


@dataclass(slots=True)
class ShapeReport:
    """Holds the measurements of one model shape.

    Attributes:
        shape: Name of the shape.
        graphs: Numbers of planned and of captured graphs, and bytes planned and used.
        fallbacks: Reasons why forwards ran outside the graphs, with their counts.
        steps: Tuples of batch size, tokens per sequence, milliseconds of a forward, and milliseconds that
            reading weights, keys and values once takes.
        parts: Milliseconds of a decode step by strategy and batch size: drafting, the target's forward,
            verification, and all of it with what the host does between steps.
        memory: Bytes planned, and used at the peak, by the engine, its model and its drafter.
        plain: Tuples of batch size, tokens per second of plain decoding, and of transformers' generate with a
            static cache and compilation, or None.
        syncs: Times that a step waits for the GPU, by strategy.
    """

    shape: str
    graphs: dict[str, float] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    steps: list[tuple[int, int, float, float]] = field(default_factory=list)
    parts: list[tuple[str, int, float, float, float, float]] = field(default_factory=list)
    memory: dict[str, int] = field(default_factory=dict)
    plain: list[tuple[int, float, float | None]] = field(default_factory=list)
    syncs: dict[str, float] = field(default_factory=dict)


def measure_shape(shape: str, bandwidth: float, peer: bool, log: Log) -> ShapeReport:
    """Measures one shape on the current CUDA device.

    Args:
        shape: Name in `SHAPES`.
        bandwidth: Bytes per second that the device's memory moves.
        peer: Whether to measure transformers' generate beside the engine.
        log: Receives a line per measurement.
    """
    report = ShapeReport(shape)
    before = _used()
    torch.cuda.reset_peak_memory_stats()
    model = random_model(SHAPES[shape], "cuda").requires_grad_(False)
    embedding = model.config.vocab_size * model.config.hidden_size
    weights = sum(p.numel() for p in model.parameters()) - embedding
    engine = _engine(model, report)
    runner = engine.runner
    for batch in BATCHES:
        for width in _WIDTHS:
            if batch * width <= MOST_ROWS:
                ms = _step_ms(runner, batch, width)
                floor = bytes_read(runner.cache.shape, weights, batch, width) / bandwidth * 1e3
                report.steps.append((batch, width, ms, floor))
        of_batch = [f"{width}: {ms:.2f}" for b, width, ms, _ in report.steps if b == batch]
        log(f"{shape}: batch {batch}, ms of a forward by tokens per sequence: {', '.join(of_batch)}")
    for strategy in STEP_STRATEGIES:
        engine.use_strategy(strategy)
        report.syncs[strategy] = syncs_of_step(engine, _requests(8, _STEPS_OF_SYNCS))
        for batch in (1, 8, 32):
            parts = _parts_ms(engine, _requests(batch, _STEPS_OF_PARTS))
            report.parts.append((strategy, batch, *parts))
            log(
                f"{shape}: {strategy}, batch {batch}: drafting {parts[0]:.2f} ms, forward {parts[1]:.2f}, "
                f"verification {parts[2]:.2f}, a step {parts[3]:.2f}"
            )
    engine.use_strategy("plain")
    speeds = {}
    for batch in (1, 8, 32):
        decode_anew(engine, _requests(batch, 16))
        speeds[batch] = decode_anew(engine, _requests(batch, _COMPLETION))
    report.fallbacks = _fallbacks(engine)
    report.memory = _memory(engine, before)
    del engine, runner
    torch.cuda.empty_cache()
    for batch, speed in speeds.items():
        static = _generate_speed(model, batch) if peer and batch != 8 else None
        report.plain.append((batch, speed, static))
        beside = "" if static is None else f", generate with a static cache {static:.0f}"
        log(f"{shape}: batch {batch}, plain {speed:.0f} tokens/s{beside}")
    return report


def _engine(model: PreTrainedModel, report: ShapeReport) -> RolloutEngine:
    """Returns an engine with a random EAGLE-3 drafter, and notes what its graphs took."""
    taps = default_tap_layers(model.config.num_hidden_layers)
    options: dict[str, Any] = {
        "max_slots": BATCHES[-1],
        "max_context": _CAPACITY,
        "tap_layers": taps,
        "kv_memory_bytes": _KV_BYTES,
    }
    engine = RolloutEngine(model, graphs=False, **options)
    before = _used()
    pool = engine.runner.capture_graphs(engine.max_nodes + 1, CudaCapturer(model.device), precapture=True)
    report.graphs = {
        "planned": len(pool.plan.keys),
        "captured": len(pool.captured),
        "planned bytes": pool.plan.total_bytes,
        "used bytes": _used() - before,
    }
    with torch.device("cuda"):
        config = eagle3_config(model.config, _DRAFT_VOCABULARY, taps)
        weights = Eagle3Model(config, torch.arange(_DRAFT_VOCABULARY)).to(torch.bfloat16)
    drafter = Eagle3Drafter(
        weights,
        engine.runner.view.module.get_input_embeddings(),
        slots=BATCHES[-1],
        capacity=engine.capacity_for(_CAPACITY, engine.max_nodes),
        dtype=torch.bfloat16,
        taps=fixed_taps(engine.runner),
    )
    engine.add_drafter(SuffixDrafter())
    engine.add_drafter(drafter)
    return engine


def _fallbacks(engine: RolloutEngine) -> dict[str, int]:
    """Returns the reasons why forwards or drafts ran outside captured graphs, with their counts."""
    found = Counter() if engine.runner.graphs is None else Counter(engine.runner.graphs.fallbacks)
    drafter = engine.drafters["eagle3"]
    assert isinstance(drafter, Eagle3Drafter) and drafter.graphs is not None
    return dict(found + drafter.graphs.captures.fallbacks)


def _memory(engine: RolloutEngine, before: int) -> dict[str, int]:
    """Compares the plan of an engine with what it took.

    Args:
        engine: The engine, after it has decoded.
        before: Bytes in use on the device before its model was made.
    """
    plan, drafter = engine.runner.memory, engine.drafters["eagle3"]
    assert plan is not None and isinstance(drafter, Eagle3Drafter)
    beyond_torch = _used() - before - torch.cuda.memory_allocated()  # what captured graphs take
    planned = sum(plan.parts.values()) - plan.parts["spare"] + plan.cache + _drafter_bytes(drafter)
    return {"planned": planned, "used": torch.cuda.max_memory_allocated() + beyond_torch}


def _drafter_bytes(drafter: Eagle3Drafter) -> int:
    """Returns the planned bytes of a drafter: weights, keys and values, captured steps and drafts."""
    config, cache = drafter.config, drafter.cache.shape
    strategies = [Strategy.parse(name) for name in STEP_STRATEGIES[1:]]
    graphs = drafter_graph_bytes(draft_shape(config, cache.dtype), strategies, cache.slots)
    lines = cache.slots * cache.capacity * cache.token_bytes
    return parameter_count(config) * cache.dtype.itemsize + lines + graphs


def _used() -> int:
    """Returns the bytes in use on the device, by anyone, without what torch only holds for later."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def _step_ms(runner: ModelRunner, batch: int, width: int) -> float:
    """Returns the milliseconds of a forward."""
    runner.cache.reserve([_CONTEXT + width + 1] * batch, active=0)
    tokens = torch.zeros(batch, width, dtype=torch.long, device="cuda")
    return seconds_of(functools.partial(runner.decode, tokens, [width] * batch, [_CONTEXT] * batch)) * 1e3


def bytes_read(cache: CacheShape, weights: int, batch: int, width: int) -> int:
    """Returns the bytes that a forward must read at least: weights, keys and values once.

    Args:
        cache: Size of the cache.
        weights: Number of weights, without the embedding.
        batch: Number of sequences.
        width: Tokens per sequence.
    """
    keys = 2 * cache.layers * cache.kv_heads * cache.head_dim
    return (weights + batch * (_CONTEXT + width) * keys) * cache.dtype.itemsize


def _parts_ms(engine: RolloutEngine, requests: Sequence[Request]) -> tuple[float, float, float, float]:
    """Returns the milliseconds of a step's parts and of the whole step, as `ShapeReport.parts` has them."""
    engine.generate(requests)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    engine.generate(requests)
    seconds = time.perf_counter() - begin - engine.prefill_seconds
    steps = [record.feedback for record in engine.records]
    draft, forward, total = (
        sum(getattr(step, name) for step in steps) / len(steps) * 1e3
        for name in ("draft_seconds", "forward_seconds", "total_seconds")
    )
    return draft, forward, total - draft - forward, seconds / len(steps) * 1e3


def _requests(count: int, tokens: int) -> list[Request]:
    """Returns requests of different prompts, which end at their length."""
    prompts = [[(7 * i + j) % 900 + 1 for j in range(_PROMPT)] for i in range(count)]
    return [
        Request(prompt, SamplingParams(max_tokens=tokens), seed=i, group=i)
        for i, prompt in enumerate(prompts)
    ]


def decode_anew(engine: RolloutEngine, requests: Sequence[Request]) -> float:
    """Decodes requests and returns the tokens per second, prefill and drafting included.

    The suffix drafter starts anew, because it may have seen the texts that are about to be decoded.
    """
    engine.drafters["suffix"] = SuffixDrafter()
    begin = time.perf_counter()
    rollouts = engine.generate(requests)
    return sum(len(r.token_ids) for r in rollouts) / (time.perf_counter() - begin)


def _generate_speed(model: Any, batch: int) -> float:
    """Returns the tokens per second of transformers' generate with a static cache, which it compiles for."""
    prompt = torch.tensor([list(r.prompt_ids) for r in _requests(batch, 1)], device="cuda")
    mask = torch.ones_like(prompt)

    def run() -> None:
        model.generate(
            prompt,
            attention_mask=mask,
            max_new_tokens=_COMPLETION,
            min_new_tokens=_COMPLETION,
            do_sample=True,
            cache_implementation="static",
        )
        torch.cuda.synchronize()

    run()
    begin = time.perf_counter()
    run()
    return batch * _COMPLETION / (time.perf_counter() - begin)


def syncs_of_step(engine: RolloutEngine, requests: Sequence[Request]) -> float:
    """Returns how often a decode step makes the host wait for the GPU, admission included."""
    engine.generate(requests)
    with _counted_syncs() as count:
        engine.generate(requests)
    return len(count) / len(engine.records)


@contextmanager
def _counted_syncs() -> Iterator[list[str]]:
    """Yields a list that receives torch's warning about each synchronizing operation."""
    seen: list[str] = []
    shown = warnings.showwarning
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = lambda message, *rest, **more: seen.append(str(message))
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield seen
        finally:
            torch.cuda.set_sync_debug_mode("default")
            warnings.showwarning = shown
