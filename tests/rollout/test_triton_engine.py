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
        for i in range(3)
    ]


def tokens_of(engine: RolloutEngine, strategy: Strategy | str) -> list[list[int]]:
    engine.use_strategy(strategy)
    return [rollout.token_ids for rollout in engine.generate(requests())]


def use_triton(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gpu_tiles, "ATTENTION_PARTS", 2)  # few for the interpreter
    for module in (fusion_check, eagle3_network):
        patch.setattr(module, "load_kernels", lambda device, dtype: TritonKernels())


@pytest.fixture(scope="module")
def built():
    """An engine on the CPU's kernels, and one on Triton's, which takes the interpreter seconds to check."""
    model = tiny_llama(layers=2, sharpness=4.0)
    expected = engine_for(model, slots=3, context=40)
    with pytest.MonkeyPatch.context() as patch:
        use_triton(patch)
        engine = engine_for(model, slots=3, context=40, graphs=True)
    engine.drafters["eagle3"]._network.capture_graphs(PlainCapturer(), precapture=False)
    return expected, engine


@pytest.fixture
def engines(built, monkeypatch):
    use_triton(monkeypatch)
    for pool in (built[1].runner.graphs, built[1].drafters["eagle3"]._network.graphs):
        pool.replays.clear()
    return built


@pytest.mark.parametrize(
    "strategy",
    [
        "plain",
        pytest.param(Strategy("suffix", 3), marks=pytest.mark.ci),
        pytest.param("eagle3:2x2/3", marks=pytest.mark.ci),
        pytest.param(Strategy("adversarial", 2), marks=pytest.mark.ci),
    ],
    ids=str,
)
def test_the_tokens_are_those_of_the_cpu(engines, strategy):
    expected, engine = engines
    assert tokens_of(engine, strategy) == tokens_of(expected, strategy)
    assert sum(engine.runner.graphs.replays.values()) == len(engine.records)
    assert not engine.runner.graphs.fallbacks


@pytest.mark.ci
def test_drafts_are_those_of_the_cpu(engines):
    expected, engine = engines
    made = []
    for each in (expected, engine):
        each.use_strategy(Strategy("eagle3", 2))
        made.append([(r.token_ids, r.stats.accepted) for r in each.generate(requests())])
    assert made[0] == made[1]
    graphs = engine.drafters["eagle3"]._network.graphs
    assert graphs.replays and not graphs.fallbacks


@pytest.mark.ci
def test_new_weights_reach_the_buckets(monkeypatch):
    model, other = tiny_llama(layers=2, sharpness=4.0), tiny_llama(layers=2, seed=5, sharpness=4.0)
    expected = tokens_of(engine_for(other, slots=3, context=40), "plain")
    use_triton(monkeypatch)
    engine = engine_for(model, slots=3, context=40, graphs=True)
    before = tokens_of(engine, "plain")
    model.load_state_dict(other.state_dict())
    engine.refresh_weights()
    assert tokens_of(engine, "plain") == expected != before


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "qwen2"])
def test_other_families_decode_on_them_too(kind, monkeypatch):
    """Norms of heads; four norms, a window that the first text outgrows and another activation; biases."""
    model = families.tiny(families.BY_KIND[kind])
    options = {"dtype": torch.float32, "max_slots": 2, "max_context": 40}
    wanted = [
        Request(list(range(1, 15)), SamplingParams(temperature=0, max_tokens=5)),
        Request([2, 2, 3], SamplingParams(max_tokens=4), seed=1),
    ]
    expected = [rollout.token_ids for rollout in RolloutEngine(model, **options).generate(wanted)]
    use_triton(monkeypatch)
    engine = RolloutEngine(model, **options, graphs=True)
    assert isinstance(engine.runner.kernels, TritonKernels)
    assert [rollout.token_ids for rollout in engine.generate(wanted)] == expected
