"""Decoding on the GPU's kernels, run by Triton's interpreter on a CPU, gives the CPU engine's tokens.

Every forward goes through the pool of buckets, as on a GPU, but nothing is captured.
"""

import pytest
import torch

pytest.importorskip("triton")

from paceline.rollout import Request, RolloutEngine, SamplingParams, Strategy
from paceline.rollout.drafters import eagle3_network
from paceline.rollout.graphs.graph_pool import PlainCapturer
from paceline.rollout.model import fusion_check
from paceline.rollout.native import gpu_tiles
from paceline.rollout.native.triton_kernels import TritonKernels
from tests.engines import engine_for, tiny_llama
from tests.rollout.model import families

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/rollout/test_gpu.py runs on the GPU")


def requests() -> list[Request]:
    return [
        Request([1 + i, 2, 3], SamplingParams(temperature=i % 2, max_tokens=3 + 2 * i), group=i % 2, seed=i)
        for i in range(4)
    ]


def tokens_of(engine: RolloutEngine, strategy: Strategy | str) -> list[list[int]]:
    engine.use_strategy(strategy)
    return [rollout.token_ids for rollout in engine.generate(requests())]


@pytest.fixture
def engines(monkeypatch):
    """An engine on the CPU's kernels, and one on Triton's."""
    model = tiny_llama(layers=2, sharpness=4.0)
    expected = engine_for(model, slots=3, context=40)
    monkeypatch.setattr(gpu_tiles, "ATTENTION_PARTS", 2)  # few for the interpreter
    for module in (fusion_check, eagle3_network):
        monkeypatch.setattr(module, "load_kernels", lambda device, dtype: TritonKernels())
    engine = engine_for(model, slots=3, context=40, graphs=True)
    engine.drafters["eagle3"]._network.capture_graphs(PlainCapturer(), precapture=False)
    return expected, engine


@pytest.mark.parametrize(
    "strategy",
    [
        "plain",
        Strategy("suffix", 3),
        pytest.param(Strategy("eagle3", 2), marks=pytest.mark.ci),
        pytest.param("eagle3:3x2/5", marks=pytest.mark.ci),
        pytest.param(Strategy("adversarial", 2), marks=pytest.mark.ci),
    ],
    ids=str,
)
def test_the_tokens_are_those_of_the_cpu(engines, strategy):
    expected, engine = engines
    assert tokens_of(engine, strategy) == tokens_of(expected, strategy)
    assert sum(engine.runner.graphs.replays.values()) == len(engine.records)
    assert not engine.runner.graphs.fallbacks


def test_drafts_are_those_of_the_cpu(engines):
    expected, engine = engines
    accepted = []
    for each in (expected, engine):
        each.use_strategy(Strategy("eagle3", 2))
        accepted.append([r.stats.accepted for r in each.generate(requests())])
    assert accepted[0] == accepted[1]
    assert sum(engine.drafters["eagle3"]._network.graphs.replays.values()) > 5


@pytest.mark.ci
def test_new_weights_reach_the_buckets(engines):
    engine = engines[1]
    model, other = tiny_llama(layers=2, sharpness=4.0), tiny_llama(layers=2, seed=5, sharpness=4.0)
    engine = engine_for(model, slots=3, context=40, graphs=True)
    before = tokens_of(engine, "plain")
    model.load_state_dict(other.state_dict())
    engine.refresh_weights()
    after = tokens_of(engine, "plain")
    assert after == tokens_of(engine_for(other, slots=3, context=40, graphs=True), "plain") != before


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "qwen2"])
def test_other_families_decode_on_them_too(kind, monkeypatch):
    """Norms of heads; four norms, a window and another activation; biases."""
    model = families.tiny(families.BY_KIND[kind])
    options = {"dtype": torch.float32, "max_slots": 2, "max_context": 40}
    expected = tokens_of(RolloutEngine(model, **options), "plain")
    monkeypatch.setattr(gpu_tiles, "ATTENTION_PARTS", 2)
    monkeypatch.setattr(fusion_check, "load_kernels", lambda device, dtype: TritonKernels())
    engine = RolloutEngine(model, **options, graphs=True)
    assert isinstance(engine.runner.kernels, TritonKernels)
    assert tokens_of(engine, "plain") == expected
