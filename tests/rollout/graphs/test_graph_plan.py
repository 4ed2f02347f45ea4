"""The planner's arithmetic, and a pool whose captures are the functions themselves."""

import pytest
import torch

from paceline.rollout import Request, RolloutEngine, SamplingParams, Strategy
from paceline.rollout.drafters import SuffixDrafter
from paceline.rollout.graphs.graph_plan import (
    NODE_BYTES,
    GraphKey,
    ModelShape,
    naive_bytes,
    plan_graphs,
    plan_keys,
    powers_of_two,
)
from paceline.rollout.graphs.graph_pool import GraphPool, PlainCapturer
from paceline.rollout.model.attention import chain_seats
from tests.engines import engine_for, tiny_llama

LLAMA_8B = ModelShape(
    layers=32, hidden=4096, intermediate=14336, heads=32, kv_heads=8, head_dim=128, vocab=128256
)
QWEN_1_5B = ModelShape(
    layers=28, hidden=1536, intermediate=8960, heads=12, kv_heads=2, head_dim=128, vocab=151936
)


def test_buckets():
    assert powers_of_two(1) == (1,)
    assert powers_of_two(6) == (1, 2, 4, 6)
    assert powers_of_two(32) == (1, 2, 4, 8, 16, 32)


def test_many_tokens_are_captured_for_small_batches_only():
    keys = plan_keys("target", (1, 2, 4, 8, 16, 32), (1, 16, 32, 64), (256,), max_rows=128)
    assert {(k.batch, k.tokens) for k in keys if k.tokens == 64} == {(1, 64), (2, 64)}
    assert {k.batch for k in keys if k.tokens == 1} == {1, 2, 4, 8, 16, 32}
    assert [k.rows for k in keys] == sorted((k.rows for k in keys), reverse=True), (
        "the largest is captured first"
    )


def test_bytes_by_hand():
    shape = ModelShape(layers=2, hidden=8, intermediate=32, heads=4, kv_heads=2, head_dim=4, vocab=50)
    key = GraphKey("target", 2, 3, 10)
    # six rows; residual and its sum 2·8; widest stage: attention (4+2·2)·4·2 = 64, scores 4·10·3 = 120
    # together 184; bfloat16; float32 sums of attention: sixteen parts of four heads, 4 + 2 values each
    assert shape.activation_bytes(key) == 6 * ((16 + 184) * 2 + 16 * 4 * 6 * 4)
    plan = plan_graphs(shape, [key, GraphKey("target", 1, 1, 10)])
    assert plan.pool_bytes == shape.activation_bytes(key)
    assert plan.output_bytes == 6 * 50 * 2
    assert plan.node_bytes == 2 * (10 * 2 + 20) * NODE_BYTES
    assert plan.total_bytes == plan.pool_bytes + plan.output_bytes + plan.node_bytes


@pytest.mark.parametrize("shape", [LLAMA_8B, QWEN_1_5B], ids=["8B", "1.5B"])
def test_bucketed_takes_at_most_a_third_of_naive(shape):
    """TLT's shape: strategies that verify 16 to 64 tokens, batches of 1 to 32."""
    batches, strategies = powers_of_two(32), (16, 24, 32, 48, 64)
    keys = plan_keys("target", batches, (1, *strategies), (2048,), max_rows=256)
    assert plan_graphs(shape, keys).total_bytes <= 0.35 * naive_bytes(shape, strategies, batches, 2048)


def requests() -> list[Request]:
    return [
        Request([1 + i % 7, 2, 3 + i], SamplingParams(max_tokens=20 + 9 * i), seed=i, group=i % 3)
        for i in range(12)
    ]


@pytest.mark.parametrize(
    "strategy", ["suffix:3x2/5", "plain", Strategy("suffix", 4), Strategy("suffix", 5)], ids=str
)
def test_bucketed_decoding_gives_the_same_tokens(strategy, monkeypatch):
    """Padding to buckets of sequences and of tokens, over several spans, changes nothing."""
    from paceline.rollout.model import fusion_check

    # torch's operators on rectangles, as on a GPU
    monkeypatch.setattr(fusion_check, "load_kernels", lambda device, dtype: None)
    model = tiny_llama(sharpness=4.0)
    results = []
    for graphs in (False, True):
        engine = RolloutEngine(
            model, dtype=torch.float32, max_slots=6, max_context=300, graphs=graphs, tap_layers=(1, 2, 3)
        )
        engine.add_drafter(SuffixDrafter())
        engine.use_strategy(strategy)
        results.append([r.token_ids for r in engine.generate(requests())])
    assert results[0] == results[1]
    pool = engine.runner.graphs
    assert sum(pool.replays.values()) == len(engine.records), "some forwards did not run through the pool"
    assert {k.batch for k in pool.replays} <= {1, 2, 4, 6}
    assert not pool.fallbacks


def test_bucketed_drafting_proposes_the_same(monkeypatch):
    """The drafter's own pool: its steps, padded to buckets of sequences, draft what they draft without it."""
    from paceline.rollout.drafters import eagle3_network

    monkeypatch.setattr(eagle3_network, "load_kernels", lambda device, dtype: None)
    model = tiny_llama(sharpness=4.0)
    results = []
    for graphs in (False, True):
        engine = engine_for(model, slots=6, context=300)
        network = engine.drafters["eagle3"]._network
        if graphs:
            network.capture_graphs(PlainCapturer(), precapture=True)
        engine.use_strategy(Strategy("eagle3", 3))
        rollouts = engine.generate(requests())
        results.append([(r.token_ids, r.stats.accepted) for r in rollouts])
    assert results[0] == results[1]
    assert sum(network.graphs.replays.values()) > 50


def test_an_update_reaches_captured_forwards(monkeypatch):
    from paceline.rollout.model import fusion_check

    monkeypatch.setattr(fusion_check, "load_kernels", lambda device, dtype: None)
    model, other = tiny_llama(seed=0), tiny_llama(seed=5)
    request = Request([1, 2, 3], SamplingParams(temperature=0, max_tokens=20))
    engine = RolloutEngine(model, dtype=torch.bfloat16, max_slots=2, max_context=64, graphs=True)
    addresses = [p.data_ptr() for p in engine.runner.view.module.parameters()]
    gains = [layer._mlp_in.gain.data_ptr() for layer in engine.runner.view.fused]
    before = engine.generate([request])[0].token_ids
    model.load_state_dict(other.state_dict())
    engine.refresh_weights()
    assert [p.data_ptr() for p in engine.runner.view.module.parameters()] == addresses
    assert [layer._mlp_in.gain.data_ptr() for layer in engine.runner.view.fused] == gains
    after = engine.generate([request])[0].token_ids
    expected = (
        RolloutEngine(other, dtype=torch.bfloat16, max_slots=2, max_context=64)
        .generate([request])[0]
        .token_ids
    )
    assert after == expected != before


def test_what_is_not_captured_falls_back_and_is_counted():
    keys = plan_keys("target", (1, 2), (1, 2), (16,), max_rows=4)
    plan = plan_graphs(LLAMA_8B, keys)

    def seats(batch, width):
        return chain_seats(torch.arange(width).expand(batch, width))

    def forward(tokens, seats, carried, span):
        return torch.nn.functional.one_hot(tokens, 10).float(), None

    pool = GraphPool(
        forward, plan, vocab=10, dtype=torch.float32, device=torch.device("cpu"), capturer=PlainCapturer()
    )
    assert pool.run(torch.tensor([[1], [2], [3]]), seats(3, 1), 16, 4) is None
    assert pool.run(torch.tensor([[1, 2, 3]]), seats(1, 3), 16, 4) is None
    assert pool.run(torch.tensor([[7]]), seats(1, 1), 32, 4)[0].argmax().item() == 7, (
        "a span met late is captured then"
    )

    class Failing:
        def capture(self, run):
            raise RuntimeError("no memory\nand more")

    failing = GraphPool(
        forward, plan, vocab=10, dtype=torch.float32, device=torch.device("cpu"), capturer=Failing()
    )
    assert failing.run(torch.tensor([[7]]), seats(1, 1), 32, 4) is None
    assert dict(failing.fallbacks) == {"capture failed: no memory": 1}
    assert sum(pool.fallbacks.values()) == 2
    assert len(pool.fallbacks) == 1


def test_a_bucket_is_no_wider_than_the_cache():
    """A longer span has fewer slots, and a bucket's padding must not write past them."""
    keys = plan_keys("target", (1, 2, 4), (1,), (16,), max_rows=4)
    pool = GraphPool(
        lambda *args: (_ for _ in ()).throw(AssertionError),
        plan_graphs(LLAMA_8B, keys),
        vocab=10,
        dtype=torch.float32,
        device=torch.device("cpu"),
        capturer=PlainCapturer(),
    )
    assert pool.key_for(3, 1, 32, slots=4) == GraphKey("target", 4, 1, 32)
    assert pool.key_for(3, 1, 32, slots=3) == GraphKey("target", 3, 1, 32)
    assert pool.key_for(5, 1, 32, slots=5) is None
