"""Compares length predictors on held-out prompts, and admission orders that use their predictions.

The engine decodes the held-out completions in arrival order, by predicted length and by true length; decode
steps, seconds and preemptions are counted, also with a small KV cache.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from paceline.benchmarks.common.harness import RolloutBench
from paceline.benchmarks.common.results import Log, Results, RowCallback, ignore_row
from paceline.rl.lengths.predictor import Example, Kind, LengthPredictor
from paceline.rl.lengths.statistics import is_loop, pinball
from paceline.rl.process.invocation import command_line
from paceline.rl.process.process_tuning import fit_process
from paceline.rl.recipe import load_config
from paceline.rl.tasks.task import load_task
from paceline.rollout import Request
from paceline.rollout.length_estimate import LengthEstimate
from paceline.rollout.model.kv_cache import SlotCache

_KINDS: tuple[Kind, ...] = ("prod_d", "prod_m", "one_shot")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument(
        "--config", default="configs/length/long_tail.yaml", help="recipe of the policy and its task"
    )
    parser.add_argument("--run", type=Path, help="finished run whose policy is used")
    parser.add_argument("--prompts", type=int, default=144, help="number of prompts; a third is held out")
    parser.add_argument("--samples", type=int, default=8, help="samples per prompt")
    parser.add_argument("--slots", type=int, default=16, help="sequences decoded concurrently")
    parser.add_argument("--cache-tokens", type=int, default=2048, help="tokens that the small KV cache holds")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/prediction"), help="JSON file of the results"
    )


def run(args: argparse.Namespace) -> None:
    """Compares the predictors, then the orders with a large and with a small KV cache."""
    fit_process(local_world_size=1)
    bench = RolloutBench(load_config(args.config), args.run, 1)
    observed = observe(bench, args.prompts, args.samples)
    known, held_out = observed.split(args.prompts * 2 // 3)
    lengths = sorted(n for e in observed.examples for n in e.lengths)
    median, p99 = lengths[len(lengths) // 2], lengths[len(lengths) * 99 // 100]
    print(f"{len(lengths)} completions: median {median}, p99 {p99}, {observed.loops} loops")
    with Results(args.out, command_line()) as results:
        rows = compare_predictors(known, held_out, bench.params.max_tokens)
        results.put("predictors", rows)
        for r in rows:
            print(
                f"{r.predictor:<42} median {r.at_median:.2f} ± {r.error_median:.2f}  0.9: {r.at_ninety:.2f} "
                f"± {r.error_ninety:.2f}"
            )
        compare_orders(bench, known, held_out, args.slots, None, print, results.into("orders"))
        print(f"with room for {args.cache_tokens} tokens:")
        compare_orders(
            bench, known, held_out, args.slots, args.cache_tokens, print, results.into("little_cache")
        )


@dataclass(frozen=True, slots=True)
class PredictionRow:
    """Holds the pinball losses of one predictor, in tokens, on prompts that it has not learned from.

    Attributes:
        predictor: Name of the predictor.
        at_median: Loss at the median, mean over held-out prompts, their samples, and seeds of the head.
        at_ninety: Loss at the 0.9 quantile, mean over the same.
        error_median: Standard error over held-out prompts of the median's difference to ``prod_d``.
        error_ninety: Standard error over held-out prompts of the 0.9 quantile's difference to ``prod_d``.
    """

    predictor: str
    at_median: float
    at_ninety: float
    error_median: float
    error_ninety: float


@dataclass(frozen=True, slots=True)
class OrderRow:
    """Holds the cost of one admission order, which also decides how much KV cache is reserved.

    Attributes:
        order: Name of the order.
        steps: Number of decode steps; all orders decode the same requests.
        seconds: Wall time.
        preempted: Number of times that a sequence was preempted for lack of cache.
    """

    order: str
    steps: int
    seconds: float
    preempted: int


class FixedLengths(LengthEstimate):
    """Predicts given lengths, found by the seed of the request, and None for all other requests."""

    def __init__(self, lengths: dict[int, float]) -> None:
        self._lengths = lengths

    def predict(self, request: Request) -> float | None:
        """Returns the length given for the request's seed."""
        return self._lengths.get(request.seed)

    def observe(self, request: Request, tokens: int) -> None:
        """Ignores the length: the predictions are fixed."""


@dataclass(frozen=True, slots=True)
class Observed:
    """Holds prompts with their hidden states and the lengths of their samples.

    Attributes:
        requests: Requests of each prompt.
        examples: Hidden state and sample lengths of each prompt.
        loops: Number of completions, over all prompts, that end in a loop.
    """

    requests: list[list[Request]]
    examples: list[Example]
    loops: int

    def split(self, at: int) -> tuple[Observed, Observed]:
        """Returns the first ``at`` prompts, and the rest."""
        first = Observed(self.requests[:at], self.examples[:at], self.loops)
        return first, Observed(self.requests[at:], self.examples[at:], self.loops)


def observe(bench: RolloutBench, prompts: int, samples: int) -> Observed:
    """Samples completions of new problems of the recipe's task and returns their lengths.

    Args:
        bench: Policy that decodes.
        prompts: Number of prompts.
        samples: Number of samples per prompt.
    """
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
    """Returns a head trained on the examples eight at a time, as RL steps bring them.

    Args:
        kind: Kind of the predictor.
        examples: Hidden states and lengths to learn from.
        longest: Maximum length, in tokens.
        seed: Seed of the head's initial weights.
    """
    head = LengthPredictor(len(examples[0].state), longest, kind, seed=seed)
    for start in range(0, len(examples), 8):
        head.learn(examples[start : start + 8])
    return head


def compare_predictors(
    known: Observed, held_out: Observed, longest: int, seeds: int = 3
) -> list[PredictionRow]:
    """Compares heads and constant predictions on held-out prompts.

    Args:
        known: Prompts that the predictors learn from.
        held_out: Prompts that they are judged on.
        longest: Maximum length, in tokens.
        seeds: Number of seeds of each head.
    """
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
        half = lengths.shape[1] // 2  # a prompt that comes again can be predicted from its earlier samples
        mean = _by_prompt(lengths[:, :half].mean(1), lengths[:, half:], q)
        losses.setdefault("mean of the prompt's own earlier samples", []).append(mean)
    reference = losses["prod_d"]
    rows = []
    for name, (median, ninety) in losses.items():
        errors = [
            (a - b).std(ddof=1) / len(a) ** 0.5 for a, b in zip((median, ninety), reference, strict=True)
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
    log: Log,
    on_row: RowCallback = ignore_row,
) -> list[OrderRow]:
    """Decodes the held-out completions in arrival order, by predicted length and by true length.

    Args:
        bench: Policy that decodes plainly.
        known: Prompts that the predictor learns from.
        held_out: Prompts whose completions are decoded.
        slots: Number of sequences decoded concurrently.
        cache_tokens: Number of tokens that the KV cache holds; None limits it by the slots only.
        log: Receives a line per order.
        on_row: Called with each row once it is measured.
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
        engine.scheduler.lengths = FixedLengths(lengths)
        if cache_tokens is not None:
            assert isinstance(engine.runner.cache, SlotCache)
            engine.runner.cache.tokens = cache_tokens
        engine.generate(requests[:slots])
        begin = time.perf_counter()
        rollouts = engine.generate(requests)
        seconds = time.perf_counter() - begin
        rows.append(OrderRow(name, len(engine.records), seconds, sum(r.stats.preempted for r in rollouts)))
        on_row(rows[-1])
        log(f"{name}: {rows[-1].steps} steps, {seconds:.1f} s, {rows[-1].preempted} preempted")
    return rows
