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
        Request([1 + i, 2, 3], SamplingParams(temperature=i % 2, max_tokens=3 + i), group=i % 2, seed=i)
        for i in range(3)
    ]


def decoded(engine: RolloutEngine, strategy: Strategy | str) -> list[tuple[list[int], int]]:
    """The tokens of each completion, and how many of them were accepted drafts."""
    engine.use_strategy(strategy)
    return [(rollout.token_ids, rollout.stats.accepted) for rollout in engine.generate(requests())]


def use_triton(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(gpu_tiles, "_PROCESSORS", 1)  # few programs for the interpreter, which run all parts
    patch.setattr(gpu_tiles, "ATTENTION_PARTS", 2)
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
        pytest.param(Strategy("eagle3", 2), marks=pytest.mark.slow),
        pytest.param(Strategy("adversarial", 2), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_is_decoded_is_what_the_cpu_decodes(engines, strategy):
    expected, engine = engines
    assert decoded(engine, strategy) == decoded(expected, strategy)
    assert sum(engine.runner.graphs.replays.values()) == len(engine.records)
    assert not engine.runner.graphs.fallbacks
    drafts = engine.drafters["eagle3"]._network.graphs
    assert bool(drafts.replays) == ("eagle3" in str(strategy)) and not drafts.fallbacks


@pytest.mark.slow
def test_new_weights_reach_the_buckets(monkeypatch):
    model, other = tiny_llama(layers=1, sharpness=4.0), tiny_llama(layers=1, seed=5, sharpness=4.0)
    expected = decoded(engine_for(other, slots=3, context=40), "plain")
    use_triton(monkeypatch)
    engine = engine_for(model, slots=3, context=40, graphs=True)
    before = decoded(engine, "plain")
    model.load_state_dict(other.state_dict())
    engine.refresh_weights()
    assert decoded(engine, "plain") == expected != before


@pytest.mark.ci
@pytest.mark.parametrize("kind", ["qwen3", "gemma3_text", "qwen2"])
def test_other_families_decode_on_them_too(kind, monkeypatch):
    """Norms of heads; four norms, a window that the first text outgrows and another activation; biases."""
    kinds = {} if kind != "gemma3_text" else {"layer_types": ["sliding_attention", "full_attention"]}
    model = families.tiny(families.BY_KIND[kind], num_hidden_layers=2 if kinds else 1, **kinds)
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
