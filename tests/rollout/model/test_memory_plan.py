"""The plan of a GPU's memory by hand, and the engine's cache that follows it on a pretended GPU."""

import pytest
import torch

from paceline.rollout import RolloutEngine, default_tap_layers
from paceline.rollout.graphs.graph_plan import NODE_BYTES, ModelShape
from paceline.rollout.model.kv_cache import CacheShape
from paceline.rollout.model.memory_plan import (
    WORKSPACE_BYTES,
    forward_parts,
    model_shape,
    plan_memory,
    weight_parts,
)
from tests.engines import tiny_llama
from tests.fake_cuda import fake_cuda, to_cuda

# 2 · 3 layers · 2 heads · 4 values, and 4 of taps: 52 values of 2 bytes
CACHE = CacheShape(3, 2, 4, slots=10, capacity=100, taps=4, dtype=torch.bfloat16)


def test_a_token_by_hand():
    assert CACHE.token_bytes == 104


@pytest.mark.parametrize(
    ("room", "limit", "cache"),
    [
        (1_000_000, None, 104_000),  # all ten slots of 100 tokens fit
        (200_000, None, 90_000),  # a twentieth is spared, 100,000 are the others'
        (200_000, 50_000, 50_000),
        (1_000_000, 500_000, 104_000),  # no more than is wanted
    ],
)
def test_keys_and_values_get_what_is_left(room, limit, cache):
    plan = plan_memory(room, {"weights": 60_000, "gradients": 40_000}, CACHE, limit)
    assert plan.cache == cache
    assert plan.parts == {"weights": 60_000, "gradients": 40_000, "spare": room // 20}


def test_what_does_not_fit_is_refused_in_a_line_with_the_numbers():
    parts = {"weights": 7_600_000_000, "gradients": 30_500_000_000, "nothing": 0}
    shape = CacheShape(28, 4, 128, slots=8, capacity=10_000, taps=0, dtype=torch.bfloat16)
    assert shape.capacity * shape.token_bytes == 573_440_000
    with pytest.raises(MemoryError) as refused:
        plan_memory(40_000_000_000, parts, shape)
    assert str(refused.value) == (
        "the GPU's 40 GB do not hold 0.573 GB of keys and values (one sequence of 10000 tokens) beside the "
        "rest, gradients 30.5, weights 7.6, spare 2: lower rollout.kv_memory_gb, rollout.max_context, "
        "rollout.max_slots or update.tokens_per_microbatch, or shard over more ranks (scale.fsdp2=true)"
    )
    with pytest.raises(MemoryError, match=r"4.59 GB of keys and values \(rollout.kv_memory_gb\)"):
        plan_memory(40_000_000_000, {"weights": 34_000_000_000}, shape, limit=5_000_000_000)
    assert plan_memory(40_700_000_000, {**parts, "gradients": 30_491_560_000}, shape).cache == 573_440_000


def test_a_forward_by_hand():
    sizes = ModelShape(layers=2, hidden=8, intermediate=32, heads=4, kv_heads=2, head_dim=4, vocab=50)
    parts = forward_parts(sizes, slots=4, prefill_tokens=512)
    # 512 rows of the residual and its sum 2 · 8, the widest stage, gate, up and product 3 · 32, and float32
    # sums of (4 + 2 · 2) · 4 queries, keys and values; logits of 512 rows in bfloat16 and three times in
    # float32
    assert parts["a forward's activations"] == 512 * ((16 + 96) * 2 + 32 * 4) + 512 * 50 * (2 + 12)
    # the buckets 1, 2, 4, 6, 8, … 512 are seventeen graphs of 2 · 10 + 20 kernels; the pool is of the 128
    # rows whose attention is in sixteen parts of four heads, 4 + 2 values each
    graphs = 17 * 40 * NODE_BYTES + 128 * ((16 + 96) * 2 + 16 * 4 * 6 * 4) + 512 * 50 * 2
    assert parts["captured graphs"] == graphs + 2 * WORKSPACE_BYTES


def test_casts_are_counted_where_the_engine_makes_them():
    model = tiny_llama()
    number = sum(p.numel() for p in model.parameters())
    assert list(weight_parts(model, torch.float32).values()) == [4 * number, 0]
    assert list(weight_parts(model, torch.bfloat16).values()) == [4 * number, 2 * number]


def engine(**options) -> RolloutEngine:
    options = {"dtype": torch.float32, "graphs": False, "max_slots": 4, "max_context": 470, **options}
    return RolloutEngine(to_cuda(tiny_llama(layers=2)), tap_layers=default_tap_layers(2), **options)


def own_bytes(taken: RolloutEngine) -> int:
    shape = taken.runner.cache.shape
    own = forward_parts(model_shape(tiny_llama(layers=2).config, shape), shape.slots, 512)
    return sum(own.values()) + sum(p.numel() * 4 for p in tiny_llama(layers=2).parameters())


def test_the_engine_takes_what_the_trainer_leaves():
    with fake_cuda(memory=200_000_000) as cuda:
        free = engine(other_memory={})
        assert free.runner.cache.tokens == 4 * 480
        token = free.runner.cache.shape.token_bytes
        others = 190_000_000 - own_bytes(free) - 1000 * token
        less = engine(other_memory={"gradients": others})
        assert less.runner.cache.tokens == 1000 // 32 * 32
        cuda.held = 5_000_000  # what this process holds is planned, not lost
        assert engine(other_memory={"gradients": others}).runner.cache.tokens == 992
        assert (
            engine(other_memory={"gradients": others}, kv_memory_bytes=600 * token).runner.cache.tokens == 576
        )


def test_without_a_trainer_a_fifth_is_left():
    with fake_cuda(memory=200_000_000):
        plan = engine().runner.memory
        assert plan.parts["drafters and an update, not planned"] == 40_000_000
        assert (
            engine(kv_memory_bytes=10_000_000)
            .runner.memory.parts.keys()
            .isdisjoint({"drafters and an update, not planned"})
        )
    assert "keys and values" in str(plan)


def test_nothing_is_allocated_where_it_does_not_fit():
    with fake_cuda(memory=200_000_000) as cuda:
        cuda.mode.largest = 0, ""
        with pytest.raises(MemoryError, match=r"gradients 0\.19"):
            engine(other_memory={"gradients": 190_000_000})
        assert cuda.mode.largest[0] <= 4096
