"""Measures the update: padded, packed, with shared prompts, on the engine's kernels."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.table import Table
from transformers import PreTrainedModel

from paceline.benchmarks.common.results import Results, machine
from paceline.rl.config.run import RunConfig
from paceline.rl.dry_run.devices import product_speed
from paceline.rl.learner.fused.fused_policy import UnsupportedPolicy
from paceline.rl.learner.log_probs import PolicyLogProbs
from paceline.rl.learner.packing import PromptRow, Sample, pack, plan
from paceline.rl.models.initial import starting_policy
from paceline.rl.models.loading import load_policy
from paceline.rl.process.console import console
from paceline.rl.process.invocation import command_line
from paceline.rl.process.process_tuning import fit_process, multiplies_bfloat16, without_slow_bfloat16
from paceline.rl.recipe import load_config
from paceline.rollout.native.build import instruction_set, runnable_instruction_sets

_PROMPT_TOKENS = 60
_LENGTHS = (8, 10, 12, 14, 20, 28, 60, 200)  # a long-tailed group of eight, as in the quickstart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--config", required=True, help="recipe of the policy and the micro-batch size")
    parser.add_argument("--untuned", action="store_true", help="keep glibc's default allocator settings")
    parser.add_argument("--ranks", type=int, default=1, help="ranks that would share this machine's cores")
    parser.add_argument("--groups", type=int, default=4, help="groups of eight samples")
    parser.add_argument("--repeats", type=int, default=5, help="rounds of passes; the fastest counts")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/update"), help="JSON file of the results"
    )


def run(args: argparse.Namespace) -> None:
    """Measures every method, prints the table and writes the results."""
    if not args.untuned:
        fit_process(local_world_size=args.ranks)
    sets = {"kernels": instruction_set(), "runnable": runnable_instruction_sets()}
    table = Table("method", "tokens/s", "÷ padded", "share of the machine's operations per second")
    with Results(args.out, command_line(), machine=machine(), instruction_sets=sets) as results:
        measured = measure_update(load_config(args.config), args.groups, args.repeats)
        for m in measured:
            results.add("updates", m)
            speed, padded = m.tokens / m.seconds, measured[0].seconds / m.seconds
            table.add_row(m.method, f"{speed:.0f}", f"{padded:.2f}", f"{m.bound / m.seconds:.0%}")
    console().print(table)


@dataclass(frozen=True, slots=True)
class UpdateMeasurement:
    """Holds the fastest pass of one method.

    Attributes:
        method: Name of the method.
        tokens: Prompt and completion tokens of every sample, however often the method computes them.
        seconds: Wall time of forward and backward.
        bound: Seconds that the matrix products which the method has to compute would take at the speed of a
            large product (6 operations per parameter and token).
    """

    method: str
    tokens: int
    seconds: float
    bound: float


def measure_update(config: RunConfig, groups: int = 2, repeats: int = 3) -> list[UpdateMeasurement]:
    """Times forward and backward over groups of eight samples of random tokens, by method.

    The methods take turns, so that a machine that slows down slows all of them down.

    Args:
        config: Recipe of the policy and the micro-batch size.
        groups: Number of groups.
        repeats: Number of timed passes of each method; the fastest counts.
    """
    path = starting_policy(config)
    rows = _random_rows(groups)
    alone = [PromptRow(row.prompt, (sample,)) for row in rows for sample in row.samples]
    padded, budget = load_policy(path), config.update.tokens_per_microbatch
    packed, fused = PolicyLogProbs(load_policy(path), fuse=False), PolicyLogProbs(load_policy(path))
    methods: dict[str, tuple[Callable[[], None], list[PromptRow]]] = {
        "padded (transformers, SDPA)": (lambda: _padded_pass(padded, alone), alone),
        "packed": (lambda: _packed_pass(packed, alone, budget), alone),
        "packed, prompts shared": (lambda: _packed_pass(packed, rows, budget), rows),
    }
    with torch.autocast("cpu", dtype=torch.bfloat16):
        supported = not isinstance(fused.fused, UnsupportedPolicy)
    if supported:
        methods["the same on the engine's kernels"] = (lambda: _packed_pass(fused, rows, budget), rows)
    fastest = dict.fromkeys(methods, torch.inf)
    for number in range(repeats + 1):
        for name, (method, _) in methods.items():
            seconds = _timed(method)
            if number > 0:  # the first pass warms up
                fastest[name] = min(fastest[name], seconds)
    fastest_dtype = torch.bfloat16 if multiplies_bfloat16(padded.device) else torch.float32
    parameters, speed = padded.num_parameters(), product_speed(fastest_dtype)
    tokens = sum(row.length for row in alone)
    return [
        UpdateMeasurement(name, tokens, fastest[name], 6 * parameters * sum(r.length for r in used) / speed)
        for name, (_, used) in methods.items()
    ]


def _random_rows(groups: int) -> list[PromptRow]:
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 1000, (count,), generator=generator).tolist()

    return [
        PromptRow(tokens(_PROMPT_TOKENS), tuple(Sample(i, tokens(n)) for i, n in enumerate(_LENGTHS)))
        for _ in range(groups)
    ]


def _timed(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _packed_pass(model: PolicyLogProbs, rows: list[PromptRow], budget: int) -> None:
    for part in plan(rows, budget):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logprobs, _ = model(pack(part), 1.0)
        logprobs.sum().backward()


def _padded_pass(model: PreTrainedModel, rows: list[PromptRow]) -> None:
    for start in range(0, len(rows), len(_LENGTHS)):
        part = rows[start : start + len(_LENGTHS)]
        longest = max(row.length for row in part)
        sequences = [[*row.prompt, *row.samples[0].tokens] for row in part]
        ids = torch.tensor([s + [0] * (longest - len(s)) for s in sequences])
        mask = torch.tensor([[1] * len(s) + [0] * (longest - len(s)) for s in sequences])
        with torch.autocast("cpu", dtype=torch.bfloat16), without_slow_bfloat16(ids.device):
            logits = model(input_ids=ids, attention_mask=mask).logits
        logprobs = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, ids[:, 1:, None])[..., 0]
        (logprobs * mask[:, 1:]).sum().backward()
