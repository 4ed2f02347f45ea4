"""Thousands of requests with cancellations and failing callbacks: nothing leaks, and each result is that of
its request alone.
"""

import gc
import random
from pathlib import Path

import pytest

from paceline.rollout import FinishReason, Request, SamplingParams
from tests.engines import engine_for, tiny_llama

BATCH, PROMPTS = 250, 120


class CallersError(Exception):
    pass


class Disturbance:
    """Cancels some requests at the fifth step, and raises at another where it is told to."""

    def __init__(self, engine, victims, breaks_at):
        self.engine, self.victims, self.breaks_at, self.steps = engine, victims, breaks_at, 0

    def __call__(self, record):
        self.steps += 1
        if self.steps == 5:
            for victim in self.victims:
                self.engine.cancel(victim)
        if self.steps == self.breaks_at:
            raise CallersError


def resident_bytes() -> int:
    gc.collect()
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


@pytest.fixture(scope="module")
def model():
    return tiny_llama(layers=2, sharpness=4.0)


@pytest.fixture(scope="module")
def alone(model):
    """Each prompt with its greedy continuation, decoded alone and plainly."""
    rng = random.Random(0)
    engine = engine_for(model, slots=1, context=160)
    made = {}
    while len(made) < PROMPTS:
        prompt = tuple(rng.randrange(1, 97) for _ in range(rng.randrange(1, 120)))
        made[prompt] = engine.generate([Request(prompt, SamplingParams(temperature=0, max_tokens=24))])[
            0
        ].token_ids
    return made


@pytest.mark.parametrize("count", [2_000, pytest.param(10_000, marks=pytest.mark.slow)])
def test_thousands_of_requests(model, alone, count):
    rng = random.Random(1)
    engine = engine_for(
        model, slots=16, context=160, max_nodes=8, kv_memory_bytes=2_000_000, prefill_tokens=64
    )
    engine.use_strategy("adaptive")
    prompts = list(alone)
    served = cancelled = broken = preempted = 0
    steady = None
    while served < count:
        requests = []
        for i in range(BATCH):
            params = SamplingParams(temperature=0, max_tokens=rng.randrange(1, 25))
            requests.append(Request(rng.choice(prompts), params, seed=i, group=rng.choice((None, i % 9))))
        disturbance = Disturbance(
            engine, rng.sample(requests, 8), rng.randrange(2, 20) if rng.random() < 0.4 else None
        )
        try:
            rollouts = engine.generate(requests, disturbance)
        except CallersError:
            broken += 1
        else:
            assert len(rollouts) == BATCH
            for request, rollout in zip(requests, rollouts, strict=True):
                wanted = alone[request.prompt_ids][: request.params.max_tokens]
                if rollout.finish_reason is FinishReason.CANCELLED:
                    cancelled += 1
                    wanted = wanted[: len(rollout.token_ids)]
                assert rollout.token_ids == wanted
                preempted += rollout.stats.preempted
            served += BATCH
        assert not engine.scheduler.active
        assert not engine.scheduler.waiting
        assert not any(engine.drafters["eagle3"]._seen)
        # allocators and the suffix index have grown to their size by then
        if steady is None and served >= count // 4:
            steady = resident_bytes()
    assert broken > 3
    assert cancelled > count / 200
    assert preempted > count / 200
    assert resident_bytes() <= 1.02 * steady
