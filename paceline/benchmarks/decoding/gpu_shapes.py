"""Measures the engine on one GPU with random weights: graphs, memory, decode steps, drafting, and a peer."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel

from paceline.benchmarks.common.results import Log
from paceline.benchmarks.decoding.model_shapes import BATCHES, SHAPES, random_model
from paceline.rollout import Request, RolloutEngine, SamplingParams, default_tap_layers
from paceline.rollout.drafters import Eagle3Drafter, SuffixDrafter
from paceline.rollout.drafters.eagle3_model import Eagle3Model, eagle3_config
from paceline.rollout.graphs.graph_plan import MOST_ROWS
from paceline.rollout.graphs.graph_pool import CudaCapturer
from paceline.rollout.model.attention import chain_seats
from paceline.rollout.model.kv_cache import CacheShape
from paceline.rollout.model.runner import ModelRunner

_CONTEXT, _CAPACITY = 512, 1024
_WIDTHS = (1, 2, 4, 8, 16, 32)  # tokens per sequence of the forwards that are timed
_DRAFT_VOCABULARY = 32000
_PROMPT, _COMPLETION = 64, 128  # tokens
_KV_BYTES = 8 << 30
_STEPS_OF_SYNCS = 24


@dataclass(slots=True)
class ShapeReport:
    """Holds the measurements of one model shape.

    Attributes:
        shape: Name of the shape.
        graphs: Numbers of planned and of captured graphs, and bytes planned and used.
        fallbacks: Reasons why forwards ran outside the graphs, with their counts.
        steps: Tuples of batch size, tokens per sequence, milliseconds of a forward, and milliseconds that
            reading weights, keys and values once takes.
        drafter: Tuples of batch size and milliseconds of a draft step.
        plain: Tuples of batch size, tokens per second of plain decoding, and of transformers' generate with a
            static cache and compilation, or None.
        syncs: Times that a step waits for the GPU, by strategy.
    """

    shape: str
    graphs: dict[str, float] = field(default_factory=dict)
    fallbacks: dict[str, int] = field(default_factory=dict)
    steps: list[tuple[int, int, float, float]] = field(default_factory=list)
    drafter: list[tuple[int, float]] = field(default_factory=list)
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
    model = random_model(SHAPES[shape], "cuda").requires_grad_(False)
    embedding = model.config.vocab_size * model.config.hidden_size
    weights = sum(p.numel() for p in model.parameters()) - embedding
    engine, drafter = _engine(model, report)
    runner = engine.runner
    for batch in BATCHES:
        for width in _WIDTHS:
            if batch * width <= MOST_ROWS:
                ms = _step_ms(runner, batch, width)
                floor = bytes_read(runner.cache.shape, weights, batch, width) / bandwidth * 1e3
                report.steps.append((batch, width, ms, floor))
        of_batch = [f"{width}: {ms:.2f}" for b, width, ms, _ in report.steps if b == batch]
        log(f"{shape}: batch {batch}, ms of a forward by tokens per sequence: {', '.join(of_batch)}")
        report.drafter.append((batch, _draft_ms(drafter, batch, model.config.hidden_size)))
    for strategy in ("plain", "eagle3:3", "eagle3:4x4/7"):
        engine.use_strategy(strategy)
        report.syncs[strategy] = syncs_of_step(engine, _requests(8, _STEPS_OF_SYNCS))
    speeds = {
        batch: tokens_per_second(engine, "plain", _requests(batch, _COMPLETION), _requests(batch, 16))
        for batch in (1, 8, 32)
    }
    report.fallbacks = dict(engine.runner.graphs.fallbacks if engine.runner.graphs is not None else {})
    del engine, drafter, runner
    torch.cuda.empty_cache()
    for batch, speed in speeds.items():
        static = _generate_speed(model, batch) if peer and batch != 8 else None
        report.plain.append((batch, speed, static))
        beside = "" if static is None else f", generate with a static cache {static:.0f}"
        log(f"{shape}: batch {batch}, plain {speed:.0f} tokens/s{beside}")
    return report


def _engine(model: PreTrainedModel, report: ShapeReport) -> tuple[RolloutEngine, Eagle3Drafter]:
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
    )
    engine.add_drafter(SuffixDrafter())
    engine.add_drafter(drafter)
    return engine, drafter


def _used() -> int:
    """Returns the bytes in use on the device, by anyone, without what torch only holds for later."""
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return total - free


def seconds_of(run: Callable[[], Any], least: float = 0.05) -> float:
    """Returns the mean seconds of a call, by CUDA events, over calls of ``least`` seconds in total."""
    for _ in range(3):
        run()
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    count = max(int(least / (time.perf_counter() - begin)), 3)
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    first.record()
    for _ in range(count):
        run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / count / 1e3


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


def _draft_ms(drafter: Eagle3Drafter, batch: int, hidden: int) -> float:
    """Returns the milliseconds of one more draft token for each sequence."""
    drafter.cache.reserve([_CONTEXT + 2] * batch, active=0)
    tokens = torch.zeros(batch, 1, dtype=torch.long, device="cuda")
    states = torch.zeros(batch, 1, hidden, dtype=torch.bfloat16, device="cuda")
    seats = chain_seats(torch.full_like(tokens, _CONTEXT))
    network = drafter._network
    return seconds_of(functools.partial(network.step, tokens, states, seats, [0] * batch)) * 1e3


def _requests(count: int, tokens: int) -> list[Request]:
    """Returns requests of different prompts, which end at their length."""
    prompts = [[(7 * i + j) % 900 + 1 for j in range(_PROMPT)] for i in range(count)]
    return [
        Request(prompt, SamplingParams(max_tokens=tokens), seed=i, group=i)
        for i, prompt in enumerate(prompts)
    ]


def tokens_per_second(
    engine: RolloutEngine, strategy: str, requests: Sequence[Request], warm: Sequence[Request]
) -> float:
    """Returns the speed of an engine, prefill and drafting included, after a warm-up on other requests.

    The suffix drafter starts anew, because it may have seen the texts that are about to be decoded.
    """
    engine.use_strategy(strategy)
    engine.generate(warm)
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
