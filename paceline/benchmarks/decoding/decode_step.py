"""Times one decode step part by part, beside the time to read the weights once."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from rich.table import Table
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
    """Holds the times of one plain decode step of ``batch`` sequences at 256 tokens of context.

    Attributes:
        batch: Number of sequences.
        step_ms: Milliseconds of a step, forward and sampling, measured without clocks inside.
        forward_ms: Milliseconds of the forward pass.
        forward_in_parts_ms: Milliseconds of the forward pass in a second measurement, with clocks around its
            parts, in which a layer calls its kernels one by one.
        parts_ms: Milliseconds of each part in that measurement.
        weights_ms: Milliseconds of reading the policy's parameters once with a vectorised sum, in the same
            process.
    """

    batch: int
    step_ms: float
    forward_ms: float
    forward_in_parts_ms: float
    parts_ms: dict[str, float]
    weights_ms: float


def profile_step(policy: PreTrainedModel, batch: int) -> StepProfile:
    """Measures a plain decode step of ``batch`` sequences."""
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
    return StepProfile(
        batch=batch,
        step_ms=_mean([f.total_seconds for f in steps]) * 1e3,
        forward_ms=_mean([f.forward_seconds for f in steps]) * 1e3,
        forward_in_parts_ms=clocked / len(counted) * 1e3,
        parts_ms={name: seconds / len(counted) * 1e3 for name, seconds in parts.items()},
        weights_ms=_read_weights(policy) * 1e3,
    )


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


@contextmanager
def _clocks() -> Iterator[dict[str, float]]:
    """Adds up the seconds spent in each part during decode steps, whose layers call one kernel after another.

    The time of a part that is called inside another is counted in the inner one only.
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
    originals.append((FusedLayer, "in_one_call", FusedLayer.in_one_call))
    decode = RolloutEngine._forward

    def clocked_step(self: RolloutEngine, *args: Any, **kwargs: Any) -> Any:
        for owner, attribute, name in _TIMED_PARTS:
            setattr(owner, attribute, clocked(getattr(owner, attribute), name))
        FusedLayer.in_one_call = lambda self: None  # type: ignore[method-assign]
        try:
            return decode(self, *args, **kwargs)
        finally:
            for owner, attribute, original in originals:
                setattr(owner, attribute, original)

    RolloutEngine._forward = clocked_step  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        RolloutEngine._forward = decode  # type: ignore[method-assign]


def _read_weights(policy: PreTrainedModel) -> float:
    """Returns the seconds of summing all parameters as 32-bit words in one block, the fastest of five."""
    count = sum(p.numel() for p in policy.parameters()) * 2 // 4
    words = torch.ones(count, dtype=torch.float32)
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        words.sum()
        best = min(best, time.perf_counter() - begin)
    return best


def refresh_seconds(policy: PreTrainedModel) -> float:
    """Returns the seconds that `RolloutEngine.refresh_weights` takes, the fastest of three."""
    engine = policy_engine(policy, max_slots=1, max_context=64)
    times = []
    for _ in range(3):
        begin = time.perf_counter()
        engine.refresh_weights()
        times.append(time.perf_counter() - begin)
    return min(times)


@torch.no_grad()
def logprob_gap(policy: PreTrainedModel, requests: list[Request]) -> tuple[float, float]:
    """Measures the gap between the engine's log-probs and those of the trainer's own bfloat16 forward.

    Args:
        policy: Policy that samples and scores.
        requests: Requests to sample.

    Returns:
        The mean and the largest absolute difference over the sampled tokens, in nats.
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
    all_gaps = torch.cat(gaps)
    return float(all_gaps.mean()), float(all_gaps.max())


def profile_table(profiles: Sequence[StepProfile]) -> Table:
    """Returns a table of decode steps part by part, one column per batch size."""
    t = Table("ms", *(f"{p.batch} sequences" for p in profiles))
    t.add_row("step", *(f"{p.step_ms:.1f}" for p in profiles))
    t.add_row("forward", *(f"{p.forward_ms:.1f}" for p in profiles))
    t.add_row("forward, kernel by kernel", *(f"{p.forward_in_parts_ms:.1f}" for p in profiles))
    for name in profiles[0].parts_ms:
        t.add_row(f"  {name}", *(f"{p.parts_ms[name]:.2f}" for p in profiles))
    t.add_row("reading the weights once", *(f"{p.weights_ms:.1f}" for p in profiles))
    t.add_row("step ÷ that", *(f"{p.step_ms / p.weights_ms:.2f}" for p in profiles))
    return t
