"""Measures the update of a 1.5B policy on one GPU: its speed, and the memory of its activations."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace

import torch

from paceline.benchmarks.common.results import Log
from paceline.benchmarks.decoding.model_shapes import SHAPES, random_model
from paceline.rl.config.run import RunConfig
from paceline.rl.learner.log_probs import PolicyLogProbs
from paceline.rl.learner.packing import PackedBatch, PromptRow, Sample, pack
from paceline.rl.memory.gpu import trainer_memory

_PROMPT, _SAMPLES, _COMPLETION = 64, 8, 504  # tokens of a prompt, samples of it, tokens of a sample
_REPEATS = 3


@dataclass(frozen=True, slots=True)
class UpdateReport:
    """Holds the measurements of forward and backward over one micro-batch.

    Attributes:
        tokens: Number of tokens of the micro-batch: one prompt and its samples.
        seconds: Seconds of the fastest pass.
        share: Share of the card's measured operations per second that its matrix products need (6 operations
            for each weight and token, without those of attention).
        planned: Bytes planned for activations.
        used: Bytes that a pass took beyond weights, their casts and gradients.
    """

    tokens: int
    seconds: float
    share: float
    planned: int
    used: int


def measure_update(arithmetic: float, log: Log, shape: str = "1.5B") -> UpdateReport:
    """Measures forward and backward in bfloat16 autocast, with float32 weights, of a group of samples.

    Args:
        arithmetic: Operations per second of a large matrix product.
        log: Receives a line.
        shape: Name in `SHAPES`.
    """
    policy = random_model(SHAPES[shape], "cuda").float().train()
    module, batch = PolicyLogProbs(policy, fuse=False), _group().to(policy.device)
    fastest = float("inf")
    for _ in range(_REPEATS):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        begin = time.perf_counter()
        with torch.autocast("cuda", dtype=torch.bfloat16):
            logprobs, _ = module(batch, 1.0)
        logprobs.mean().backward()
        torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - begin)
    weights = policy.num_parameters()
    embedding = policy.get_input_embeddings().weight.numel()
    tokens = len(batch.tokens)
    config = RunConfig()
    config = replace(config, update=replace(config.update, tokens_per_microbatch=tokens))
    report = UpdateReport(
        tokens,
        fastest,
        6 * (weights - embedding) * tokens / fastest / arithmetic,
        trainer_memory(config, policy.config, 1)["activations of a micro-batch"],
        torch.cuda.max_memory_allocated() - 10 * weights,
    )
    log(
        f"update of {shape}: {tokens / fastest:.0f} tokens/s, {report.share:.0%} of the card's operations; "
        f"activations {report.used / 1e9:.2f} GB, {report.planned / 1e9:.2f} planned"
    )
    return report


def _group() -> PackedBatch:
    """Returns a prompt with its samples, of random tokens."""
    generator = torch.Generator().manual_seed(0)

    def tokens(count: int) -> list[int]:
        return torch.randint(3, 1000, (count,), generator=generator).tolist()

    samples = tuple(Sample(i, tokens(_COMPLETION)) for i in range(_SAMPLES))
    return pack([PromptRow(tokens(_PROMPT), samples)])
