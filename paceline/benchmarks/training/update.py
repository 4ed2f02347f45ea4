"""Measures the update's forward and backward pass: padded, packed, and packed with shared prompts."""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, PreTrainedModel

from paceline.rl.config.run import RunConfig
from paceline.rl.dry_run.devices import product_speed
from paceline.rl.learner.log_probs import PolicyLogProbs
from paceline.rl.learner.packing import PromptRow, Sample, pack, plan
from paceline.rl.models.initial import starting_policy
from paceline.rl.process.console import console
from paceline.rl.process.process_tuning import fit_process
from paceline.rl.recipe import load_config

_PROMPT_TOKENS = 60
_LENGTHS = (8, 10, 12, 14, 20, 28, 60, 200)  # a long-tailed group of eight, as in the quickstart


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--config", required=True, help="recipe of the policy and the micro-batch size")
    parser.add_argument("--untuned", action="store_true", help="keep glibc's default allocator settings")


def run(args: argparse.Namespace) -> None:
    """Measures every method and prints its tokens per second."""
    if not args.untuned:
        fit_process(local_world_size=1)
    results = measure_update(load_config(args.config))
    table = Table("method", "tokens/s", "÷ padded", "share of the machine's operations per second")
    for m in results:
        table.add_row(
            m.method,
            f"{m.tokens / m.seconds:.0f}",
            f"{results[0].seconds / m.seconds:.2f}",
            f"{m.bound / m.seconds:.0%}",
        )
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

    Args:
        config: Recipe of the policy and the micro-batch size.
        groups: Number of groups.
        repeats: Number of timed passes; the fastest counts.
    """
    path = starting_policy(config)
    vocab = 1000
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, vocab, (count,), generator=generator).tolist()

    rows = [
        PromptRow(tokens(_PROMPT_TOKENS), tuple(Sample(i, tokens(n)) for i, n in enumerate(_LENGTHS)))
        for _ in range(groups)
    ]
    alone = [PromptRow(row.prompt, (sample,)) for row in rows for sample in row.samples]
    total = sum(row.length for row in alone)
    padded = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    packed = PolicyLogProbs(AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32))
    budget = config.update.tokens_per_microbatch
    methods: dict[str, Callable[[], None]] = {
        "padded (transformers, SDPA)": lambda: _padded_pass(padded, alone),
        "packed": lambda: _packed_pass(packed, alone, budget),
        "packed, prompts shared": lambda: _packed_pass(packed, rows, budget),
    }
    parameters, flops = padded.num_parameters(), product_speed(torch.bfloat16)
    results = []
    for name, run in methods.items():
        run()
        best = min(_timed(run) for _ in range(repeats))
        needed = sum(row.length for row in (rows if name.endswith("shared") else alone))
        results.append(UpdateMeasurement(name, total, best, 6 * parameters * needed / flops))
    return results


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
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=ids, attention_mask=mask).logits
        logprobs = torch.log_softmax(logits[:, :-1].float(), -1).gather(-1, ids[:, 1:, None])[..., 0]
        (logprobs * mask[:, 1:]).sum().backward()
