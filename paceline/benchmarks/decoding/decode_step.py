"""Where the time of one decode step goes, against the time to read the weights once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from paceline.rl.generation.policy_engine import policy_engine
from paceline.rollout import Request, RolloutEngine, SamplingParams
from paceline.rollout.model.fused_layer import FusedLayer
from paceline.rollout.model.packed_linear import PackedLinear
from paceline.rollout.native import Kernels

_CONTEXT = 256
_TIMED_PARTS: tuple[tuple[type, str, str], ...] = (
    (PackedLinear, "forward", "matrix products"),
    (Kernels, "attend", "attention"),
    (Kernels, "rotate_and_store", "rotary and cache"),
    (Kernels, "rms_norm", "norms"),
    (Kernels, "silu_gate", "gate"),
    (FusedLayer, "forward", "between them, in a layer"),
)


@dataclass(frozen=True, slots=True)
class StepProfile:
    """One plain decode step of ``batch`` sequences at 256 tokens of context.

    Attributes:
        batch: Sequences.
        step_ms: Forward and sampling, nothing else timed.
        forward_ms: The forward of it.
        parts_ms: Of the forward, item by item, measured in a second pass with clocks around the parts.
        weights_ms: One reading of the policy's parameters by one vectorised sum, in the same process.
    """

    batch: int
    step_ms: float
    forward_ms: float
    parts_ms: dict[str, float]
    weights_ms: float


def profile_step(policy: PreTrainedModel, batch: int) -> StepProfile:
    """Measures a step; see `StepProfile`."""
    engine = policy_engine(policy, max_slots=batch, max_context=_CONTEXT + 80)
    requests = [
        Request([5 + i] * (_CONTEXT - 20), SamplingParams(max_tokens=41), seed=i) for i in range(batch)
    ]
    engine.generate(requests)
    engine.generate(requests)
    steps = [r.feedback for r in engine.records if r.feedback.active == batch]
    with _clocks() as clocks:
        engine.generate(requests)
        counted = [r.feedback for r in engine.records if r.feedback.active == batch]
    clocked = sum(f.forward_seconds for f in counted)
    parts = dict(clocks)
    parts["around the layers"] = clocked - sum(parts.values())
    scale = _mean([f.forward_seconds for f in steps]) / clocked * 1e3
    return StepProfile(
        batch=batch,
        step_ms=_mean([f.total_seconds for f in steps]) * 1e3,
        forward_ms=_mean([f.forward_seconds for f in steps]) * 1e3,
        parts_ms={name: seconds * scale for name, seconds in parts.items()},
        weights_ms=_read_weights(policy) * 1e3,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@contextmanager
def _clocks() -> Iterator[dict[str, float]]:
    """Adds up the seconds inside each part during decode steps; an inner part's time is not counted in the
    outer one.
    """
    spent: dict[str, float] = dict.fromkeys((name for _, _, name in _TIMED_PARTS), 0.0)
    inner = [0.0]

    def clocked(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            outer, inner[0] = inner[0], 0.0
            begin = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                elapsed = time.perf_counter() - begin
                spent[name] += elapsed - inner[0]
                inner[0] = outer + elapsed

        return timed

    originals = [(owner, attribute, getattr(owner, attribute)) for owner, attribute, _ in _TIMED_PARTS]
    decode = RolloutEngine._forward

    def only_steps(self: RolloutEngine, *args: Any, **kwargs: Any) -> Any:
        for owner, attribute, name in _TIMED_PARTS:
            setattr(owner, attribute, clocked(getattr(owner, attribute), name))
        try:
            return decode(self, *args, **kwargs)
        finally:
            for owner, attribute, original in originals:
                setattr(owner, attribute, original)

    RolloutEngine._forward = only_steps  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        RolloutEngine._forward = decode  # type: ignore[method-assign]


def _read_weights(policy: PreTrainedModel) -> float:
    """Seconds to sum every parameter once, as 32-bit words in one block: the fastest of five."""
    count = sum(p.numel() for p in policy.parameters()) * 2 // 4
    words = torch.ones(count, dtype=torch.float32)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        words.sum()
        best = min(best, time.perf_counter() - begin)
    return best


def refresh_seconds(policy: PreTrainedModel) -> float:
    """Seconds that `RolloutEngine.refresh_weights` takes, the fastest of three."""
    engine = policy_engine(policy, max_slots=1, max_context=64)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        engine.refresh_weights()
        times.append(time.perf_counter() - begin)
    return min(times)


@torch.no_grad()
def logprob_gap(policy: PreTrainedModel, requests: list[Request]) -> tuple[float, float]:
    """Mean and largest |log-prob of the engine − log-prob of the trainer's own bfloat16 forward| over sampled
    tokens.
    """
    engine = policy_engine(policy, max_slots=16, max_context=512)
    gaps = []
    for rollout in engine.generate(requests):
        start = len(rollout.request.prompt_ids) - 1
        ids = torch.tensor([[*rollout.request.prompt_ids, *rollout.token_ids]])
        full = (
            policy(ids)
            .logits[0, start:-1]
            .float()
            .log_softmax(-1)
            .gather(-1, ids[0, start + 1 :, None])[:, 0]
        )
        gaps.append((torch.tensor(rollout.logprobs) - full).abs())
    every = torch.cat(gaps)
    return float(every.mean()), float(every.max())
