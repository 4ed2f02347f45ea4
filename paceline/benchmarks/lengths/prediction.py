"""Length predictors on held-out prompts, and what an engine makes of their word."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from paceline.benchmarks.common.harness import RolloutBench
from paceline.benchmarks.common.results import Keep, ignore
from paceline.rl.lengths.predictor import Example, Kind, LengthPredictor
from paceline.rl.lengths.statistics import is_loop, pinball
from paceline.rl.tasks.task import load_task
from paceline.rollout import Request
from paceline.rollout.length_estimate import LengthEstimate

_KINDS: tuple[Kind, ...] = ("prod_d", "prod_m", "one_shot")


@dataclass(frozen=True, slots=True)
class PredictionRow:
    """Pinball losses, in tokens, on prompts that were not learned from.

    Attributes:
        predictor: Name.
        at_median, at_ninety: Mean over held-out prompts and samples, and over seeds of the head.
        error_median, error_ninety: Standard errors over held-out prompts of the difference to ``prod_d``.
    """

    predictor: str
    at_median: float
    at_ninety: float
    error_median: float
    error_ninety: float


@dataclass(frozen=True, slots=True)
class OrderRow:
    """One way to decide who is started first and how much cache is kept.

    Attributes:
        order: Name.
        steps, seconds: Decode steps and wall time of the same requests.
        preempted: Times that a sequence was put back for lack of cache.
    """

    order: str
    steps: int
    seconds: float
    preempted: int


class _Known(LengthEstimate):
    """Lengths by seed of the request; None for all others."""

    def __init__(self, lengths: dict[int, float]) -> None:
        self._lengths = lengths

    def predict(self, request: Request) -> float | None:
        return self._lengths.get(request.seed)

    def observe(self, request: Request, tokens: int) -> None:
        """Nothing is learned."""


@dataclass(frozen=True, slots=True)
class Observed:
    """Prompts of the policy with their states and the lengths of their samples."""

    requests: list[list[Request]]
    examples: list[Example]
    loops: int

    def split(self, at: int) -> tuple[Observed, Observed]:
        """The first prompts, and the rest."""
        first = Observed(self.requests[:at], self.examples[:at], self.loops)
        return first, Observed(self.requests[at:], self.examples[at:], self.loops)


def observe(bench: RolloutBench, prompts: int, samples: int) -> Observed:
    """Draws completions of a recipe's kind of problems."""
    problems = load_task(replace(bench.config.task, size=prompts), seed=4321).problems[:prompts]
    problems = random.Random(0).sample(problems, len(problems))
    requests = bench.requests(problems, prompts * samples, samples)
    engine = bench.engine(32, bench.params.max_tokens)
    states = engine.prompt_states([requests[i].prompt_ids for i in range(0, len(requests), samples)])
    rollouts = engine.generate(requests)
    lengths = [len(r.token_ids) for r in rollouts]
    groups = [requests[i : i + samples] for i in range(0, len(requests), samples)]
    examples = [
        Example(state, tuple(lengths[i * samples : (i + 1) * samples])) for i, state in enumerate(states)
    ]
    return Observed(groups, examples, sum(is_loop(r.token_ids) for r in rollouts))


def trained(kind: Kind, examples: Sequence[Example], longest: int, seed: int) -> LengthPredictor:
    """A head that has seen the examples eight at a time, as RL steps bring them."""
    head = LengthPredictor(len(examples[0].state), longest, kind, seed=seed)
    for start in range(0, len(examples), 8):
        head.learn(examples[start : start + 8])
    return head


def compare_predictors(
    known: Observed, held_out: Observed, longest: int, seeds: int = 3
) -> list[PredictionRow]:
    """Heads and constants on held-out prompts."""
    states = torch.stack([e.state for e in held_out.examples])
    lengths = np.array([e.lengths for e in held_out.examples])
    learned = np.array([n for e in known.examples for n in e.lengths])
    losses: dict[str, list[np.ndarray]] = {}
    for q in (0.5, 0.9):
        for kind in _KINDS:
            heads = [trained(kind, known.examples, longest, seed) for seed in range(seeds)]
            each = [_by_prompt(head.quantile(states, q).numpy(), lengths, q) for head in heads]
            losses.setdefault(kind, []).append(np.mean(each, axis=0))
        constants = {
            "quantile of all prompts": np.quantile(learned, q),
            "mean of all prompts": learned.mean(),
        }
        for name, value in constants.items():
            losses.setdefault(name, []).append(_by_prompt(np.full(len(lengths), value), lengths, q))
        half = lengths.shape[1] // 2  # what a prompt that is asked again is known by: its own earlier samples
        mean = _by_prompt(lengths[:, :half].mean(1), lengths[:, half:], q)
        losses.setdefault("mean of the prompt's own earlier samples", []).append(mean)
    best = losses["prod_d"]
    rows = []
    for name, (median, ninety) in losses.items():
        errors = [
            (of - to).std(ddof=1) / len(of) ** 0.5 for of, to in zip((median, ninety), best, strict=True)
        ]
        rows.append(
            PredictionRow(
                name, float(median.mean()), float(ninety.mean()), float(errors[0]), float(errors[1])
            )
        )
    return rows


def _by_prompt(predicted: np.ndarray, lengths: np.ndarray, q: float) -> np.ndarray:
    return np.array([pinball(predicted[i : i + 1], lengths[i : i + 1], q) for i in range(len(lengths))])


def compare_orders(
    bench: RolloutBench,
    known: Observed,
    held_out: Observed,
    slots: int,
    cache_tokens: int | None,
    say: Callable[[str], None],
    keep: Keep = ignore,
) -> list[OrderRow]:
    """The held-out prompts' completions, in arrival order, by prediction, and by what they turned out to be.

    Args:
        bench: Whose policy decodes, plainly.
        known, held_out: From `observe`; heads learn from the first.
        slots: Sequences decoded together.
        cache_tokens: That the cache holds; None for no limit but the slots'.
        say: Progress.
        keep: Takes each row as it comes.
    """
    longest = bench.params.max_tokens
    head = trained("prod_d", known.examples, longest, seed=0)
    predicted = head.quantile(torch.stack([e.state for e in held_out.examples]), 0.9).tolist()
    pairs = [
        (
            replace(request, params=replace(request.params, max_tokens=length, stop_token_ids=())),
            predicted[number],
            length,
        )
        for number, (group, example) in enumerate(zip(held_out.requests, held_out.examples, strict=True))
        for request, length in zip(group, example.lengths, strict=True)
    ]
    random.Random(1).shuffle(pairs)
    requests = [request for request, _, _ in pairs]
    estimates: dict[str, dict[int, float]] = {
        "arrival order": {},
        "longest predicted first (ProD-D)": {request.seed: expected for request, expected, _ in pairs},
        "longest first (oracle)": {request.seed: float(length) for request, _, length in pairs},
    }
    if cache_tokens is not None:
        estimates["all kept room for the longest"] = {request.seed: float(longest) for request in requests}
    rows = []
    for name, lengths in estimates.items():
        engine = bench.engine(slots, longest, drafters=())
        engine.scheduler.lengths = _Known(lengths)
        if cache_tokens is not None:
            engine.runner.cache.tokens = cache_tokens
        engine.generate(requests[:slots])
        begin = time.perf_counter()
        rollouts = engine.generate(requests)
        seconds = time.perf_counter() - begin
        rows.append(OrderRow(name, len(engine.records), seconds, sum(r.stats.preempted for r in rollouts)))
        keep(rows[-1])
        say(f"{name}: {rows[-1].steps} steps, {seconds:.1f} s, {rows[-1].preempted} preempted")
    return rows
