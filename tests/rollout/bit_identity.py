"""Decodes the same requests in many ways and counts what differs from plain decoding one by one, bit for bit.

``python -m tests.rollout.bit_identity COUNT [float32]`` prints a line for each way; PACELINE_ISA chooses the
kernels.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch

from paceline.rollout import FinishReason, Request, Rollout, RolloutEngine, SamplingParams
from paceline.rollout.drafters import SuffixDrafter
from tests.engines import tiny_llama

STRATEGIES = ("plain", "suffix:3", "suffix:5x3/11")
SLOTS = (1, 4, 16)
_CONTEXT = 260


def requests(count: int) -> list[Request]:
    """Requests whose texts repeat themselves, so that drafts are accepted; one in eight is long."""
    lengths = [150 if i % 8 == 1 else 8 + i * 7 % 20 for i in range(count)]
    return [
        Request([5, 6, 5, 6, 7 + i % 3], SamplingParams(i % 4 / 3, max_tokens=length), seed=i, group=i % 5)
        for i, length in enumerate(lengths)
    ]


def bits(rollouts: Sequence[Rollout]) -> list[tuple[tuple[int, ...], tuple[float, ...]]]:
    return [(tuple(r.token_ids), tuple(r.logprobs)) for r in rollouts]


class _TooShort:
    """Predicts completions so short that sequences outgrow the memory and are preempted."""

    def predict(self, request: Request) -> float:
        return 5.0

    def observe(self, request: Request, tokens: int) -> None:
        pass


def engine_of(model, slots: int, strategy: str, tokens: int | None = None) -> RolloutEngine:
    """An engine whose cache holds ``tokens`` tokens, which it believes to be enough, or all slots in full."""
    options = {"max_slots": slots, "max_context": _CONTEXT, "max_nodes": 11}
    engine = RolloutEngine(model, **options)
    if tokens is not None:
        limit = tokens * engine.runner.cache.shape.token_bytes
        engine = RolloutEngine(model, **options, kv_memory_bytes=limit, lengths=_TooShort())
    engine.add_drafter(SuffixDrafter())
    engine.use_strategy(strategy)
    return engine


def in_pieces(engine: RolloutEngine, wanted: Sequence[Request]) -> list[Rollout]:
    """Pauses after every 50 tokens or so, and resumes."""
    done: dict[int, Rollout] = {}
    left = dict(enumerate(wanted))
    while left:
        rollouts = engine.generate(list(left.values()), token_budget=50)
        for index, rollout in zip(list(left), rollouts, strict=True):
            if rollout.finish_reason is FinishReason.PAUSED:
                left[index] = replace(wanted[index], resume=rollout)
            else:
                done[index] = rollout
                del left[index]
    return [done[i] for i in range(len(wanted))]


def differing(count: int, dtype: torch.dtype) -> Iterator[tuple[str, int, int]]:
    """Yields a way of decoding, how many completions differ in a bit, and how often it did what it is for."""
    model = tiny_llama(vocab_size=128, layers=3, sharpness=30.0, hidden=128).to(dtype)
    wanted = requests(count)
    expected = bits(engine_of(model, 1, "plain").generate(wanted))

    def compared(way: str, rollouts: Sequence[Rollout], tried: int) -> tuple[str, int, int]:
        return way, sum(a != b for a, b in zip(bits(rollouts), expected, strict=True)), tried

    for strategy, slots in itertools.product(STRATEGIES, SLOTS):
        rollouts = engine_of(model, slots, strategy).generate(wanted)
        tried = len(rollouts) if strategy == "plain" else sum(r.stats.accepted for r in rollouts)
        yield compared(f"{strategy}, {slots} slots", rollouts, tried)
    for strategy in STRATEGIES:
        alone = engine_of(model, 4, strategy)
        yield compared(f"{strategy}, alone", [alone.generate([r])[0] for r in wanted], count)
        yield compared(f"{strategy}, in pieces", in_pieces(engine_of(model, 4, strategy), wanted), count)
        rollouts = engine_of(model, 8, strategy, tokens=300).generate(wanted)
        yield compared(f"{strategy}, preempted", rollouts, sum(r.stats.preempted for r in rollouts))


if __name__ == "__main__":
    torch.set_num_threads(1)
    failed = 0
    wanted_dtype = torch.float32 if "float32" in sys.argv[2:] else torch.bfloat16
    for way, different, tried in differing(int(sys.argv[1]), wanted_dtype):
        print(f"{way}: {different} differ, tried {tried} times", flush=True)
        failed += different > 0 or tried == 0
    sys.exit(failed > 0)
