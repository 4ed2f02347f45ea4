"""What only a GPU's rules show, on a pretended GPU: one device, captured graphs, few waits, bounded memory.

tests/rollout/test_gpu.py asks a real one. What is left out here: Triton's programs have stand-ins
(tests/fake_cuda/kernels.py), streams cannot race, and nothing is timed.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from paceline.rollout import Request, RolloutEngine, SamplingParams
from paceline.rollout.drafters import DraftRules, eagle3, eagle3_network
from paceline.rollout.engine import engine as engine_module
from paceline.rollout.graphs.graph_pool import CudaCapturer, GraphPool
from paceline.rollout.model import fusion_check, runner
from paceline.rollout.native.triton_kernels import TritonKernels
from tests import engines
from tests.engines import engine_for, full_engine, tiny_llama
from tests.fake_cuda import Cuda, DeviceMixError, IllegalCaptureError, Wait, fake_cuda, to_cuda
from tests.fake_cuda import kernels as stand_ins

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="tests/rollout/test_gpu.py runs on the GPU")

DRAWN_CHAIN = DraftRules(tree="static", draw="replacement")
DRAWN_TREE = DraftRules(tree="static", draw="without_replacement")
TOKEN_BYTES = (2 * 2 * 16 + 4 * 64) * 4  # keys and values, taps


class TooShort:
    """Predicts completions so short that sequences outgrow the memory and are preempted."""

    def predict(self, request: Request) -> float:
        return 2.0

    def observe(self, request: Request, tokens: int) -> None:
        pass


def model(seed: int = 0, layers: int = 1):
    return tiny_llama(seed=seed, layers=layers, sharpness=4.0)


def requests(count: int = 6, tokens: int = 8) -> list[Request]:
    return [
        Request(
            [1 + i, 2, 3], SamplingParams(temperature=i % 2, max_tokens=tokens + 3 * i), group=i % 2, seed=i
        )
        for i in range(count)
    ]


@pytest.fixture
def cuda(monkeypatch) -> Iterator[Cuda]:
    monkeypatch.setattr(runner, "MOST_ROWS", 64)  # fewer graphs
    with fake_cuda() as pretended:
        yield pretended
        assert pretended.mode.mixes == []


@pytest.fixture(params=["triton", "operators"])
def path(request, monkeypatch) -> str:
    """The ways a GPU decodes: Triton's kernels, or torch's operators where these do not serve."""
    if request.param == "operators":
        for module in (fusion_check, eagle3_network):
            monkeypatch.setattr(module, "load_kernels", lambda device, dtype: None)
    return request.param


def tokens_of(engine: RolloutEngine, strategy: str, count: int = 6) -> list[list[int]]:
    engine.use_strategy(strategy)
    return [rollout.token_ids for rollout in engine.generate(requests(count))]


def on_cpu(
    strategies: Sequence[str], rules: DraftRules | None = None, seed: int = 0
) -> list[list[list[int]]]:
    engine = engine_for(model(seed), slots=4, context=60, rules=rules)
    return [tokens_of(engine, strategy) for strategy in strategies]


def tokens_and_drafts(engine: RolloutEngine, monkeypatch) -> tuple[list[list[int]], list[list[list[int]]]]:
    """What eagle3:3 decodes, and the tokens of every draft."""
    drafts, drafter = [], engine.drafters["eagle3"]

    def propose(*args, original=drafter.propose):
        drafts.append(original(*args))
        return drafts[-1]

    monkeypatch.setattr(drafter, "propose", propose)
    tokens = tokens_of(engine, "eagle3:3")
    return tokens, [draft.tokens.tolist() for draft in drafts]


def pools(engine: RolloutEngine) -> list[GraphPool]:
    return [engine.runner.graphs, engine.drafters["eagle3"]._network.graphs]


def check_graphs(engine: RolloutEngine) -> None:
    """Everything planned is captured, and no forward of the last call ran outside the graphs."""
    for pool in pools(engine):
        assert set(pool.plan.keys) <= set(pool.captured)
        assert not pool.fallbacks
    assert sum(engine.runner.graphs.replays.values()) >= len(engine.records)
    drafts = engine.drafters["eagle3"].graphs
    assert drafts is None or not drafts.captures.fallbacks


def waits_of_steps(cuda: Cuda, engine: RolloutEngine, wanted: Sequence[Request]) -> list[list[Wait]]:
    """The waits of each step, without those that admit requests or hand out finished traces."""
    steps: list[list[Wait]] = []
    cuda.mode.waits.clear()

    def note(record: object) -> None:
        steps.append([w for w in cuda.mode.waits if not w.callers & {"_admit", "_finished"}])
        cuda.mode.waits.clear()

    engine.generate(wanted, on_step=note)
    return steps


FIXED = ("plain", "suffix:4", "suffix:4x2/6", "eagle3:3", "eagle3:4x3/8", "parallel:4", "parallel:3x2/6")


@pytest.mark.parametrize(
    ("path", "strategies", "rules"),
    [
        ("triton", FIXED, None),
        ("operators", FIXED, None),
        ("triton", ("eagle3:3",), DRAWN_CHAIN),
        ("triton", ("eagle3:3x2/6", "parallel:3x2/6"), DRAWN_TREE),
    ],
    ids=["fixed", "fixed, operators", "drawn chains", "drawn trees"],
    indirect=["path"],
)
def test_graphs_give_the_tokens_of_the_cpu(cuda, path, strategies, rules):
    engine = engine_for(to_cuda(model()), slots=4, context=60, rules=rules, collect_traces=True)
    captured = [pool.captured for pool in pools(engine)]
    for strategy, expected in zip(strategies, on_cpu(strategies, rules), strict=True):
        assert tokens_of(engine, strategy) == expected, strategy
        check_graphs(engine)
    if path == "triton":  # one span, so that nothing is captured within a rollout
        assert [pool.captured for pool in pools(engine)] == captured


def test_sequences_that_outgrow_the_memory_stay_in_the_graphs(cuda, path):
    """Rectangles of a longer span have fewer slots than the buckets that were planned."""
    prompt, context, tokens = (3, 60, 160) if path == "triton" else (110, 150, 520)
    options = {"slots": 4, "context": context, "kv_memory_bytes": TOKEN_BYTES * tokens}
    engine = engine_for(to_cuda(model()), **options, lengths=TooShort())
    alone = engine_for(model(), slots=4, context=context)
    wanted = [Request([1 + i] * prompt, SamplingParams(max_tokens=30 + i), seed=i) for i in range(4)]
    expected = [r.token_ids for r in alone.generate(wanted)]
    for strategy in ("plain", "eagle3:3"):
        engine.use_strategy(strategy)
        rollouts = engine.generate(wanted)
        assert [r.token_ids for r in rollouts] == expected
        assert sum(r.stats.preempted for r in rollouts) > 0
        check_graphs(engine)


def test_an_update_reaches_the_graphs(cuda, path):
    policy = to_cuda(model())
    engine = engine_for(policy, slots=4, context=60)
    before = tokens_of(engine, "plain")
    captured = engine.runner.graphs.captured
    policy.load_state_dict(to_cuda(model(seed=5)).state_dict())
    engine.refresh_weights()
    assert tokens_of(engine, "plain") == on_cpu(["plain"], seed=5)[0] != before
    assert engine.runner.graphs.captured == captured
    check_graphs(engine)


def test_weights_that_have_moved_are_captured_anew(cuda, path, monkeypatch):
    """A trainer that wraps or offloads its module gives parameters other memory: the embedding, then all."""
    policy, other, on_host = to_cuda(model()), to_cuda(model(seed=5)), model()
    engine = engine_for(policy, slots=4, context=60)
    reference = engine_for(on_host, slots=4, context=60)
    for each in (engine, reference):  # both have seen how long the requests get, which orders them
        tokens_of(each, "eagle3:3")
    replaced = list(zip(policy.parameters(), other.parameters(), strict=True))
    assert replaced[0][0] is policy.model.embed_tokens.weight
    for moved in (replaced[:1], replaced):
        for parameter, new in moved:
            parameter.data = new.data.clone()
        on_host.load_state_dict({name: x.cpu() for name, x in policy.state_dict().items()})
        for each in (engine, reference):
            each.refresh_weights()
        assert tokens_and_drafts(engine, monkeypatch) == tokens_and_drafts(reference, monkeypatch)
        check_graphs(engine)


def test_the_engine_runs_on_a_device_that_is_not_the_current_one(monkeypatch):
    monkeypatch.setattr(runner, "MOST_ROWS", 64)
    with fake_cuda(count=2) as cuda:
        engine = engine_for(to_cuda(model(), "cuda:1"), slots=4, context=60)
        assert cuda.mode.device == torch.device("cuda:0")
        assert tokens_of(engine, "eagle3:3") == on_cpu(["plain"])[0]
        check_graphs(engine)
        assert cuda.mode.device == torch.device("cuda:0")


@pytest.fixture
def tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    yield
    torch.backends.cuda.matmul.fp32_precision = before


def test_layers_are_fused_where_a_trainer_allows_tf32(cuda, tf32):
    """With TF32 the original layer's attention scores are off by more than the check's tolerance."""
    x = torch.full((1, 1), 1 + 2**-12, device="cuda")
    assert (x @ x).item() == 1
    wide = to_cuda(tiny_llama(layers=1, hidden=512))
    engine = RolloutEngine(wide, dtype=torch.float32, max_slots=2, max_context=40, graphs=False)
    assert engine.fusion == "1 of 1 decoder layers fused, 1 with native kernels"
    assert torch.backends.cuda.matmul.fp32_precision == "tf32"


def test_drafts_are_cut_to_what_the_graphs_hold(cuda, path, monkeypatch):
    monkeypatch.setattr(runner, "MOST_ROWS", 8)
    strategies = ("suffix:4", "suffix:4x2/6", "eagle3:3", "eagle3:4x3/8")
    engine = engine_for(to_cuda(model()), slots=4, context=60)
    for strategy, expected in zip(strategies, on_cpu(strategies), strict=True):
        assert tokens_of(engine, strategy) == expected, strategy
        check_graphs(engine)
        drafted = [(step.active, max(step.drafted)) for step in (r.feedback for r in engine.records)]
        assert max(n for active, n in drafted if active == 4) == 1
        assert max(n for active, n in drafted if active < 4) > 1


def test_programs_of_few_tokens_are_placed_early(cuda, monkeypatch):
    seen, multiply = set(), stand_ins._multiply

    def note(*args, **options):
        seen.add((args[8] <= 64, options["PDL"], options.get("launch_pdl", False)))
        multiply(*args, **options)

    monkeypatch.setattr(stand_ins, "_multiply", note)
    engine = engine_for(to_cuda(model()), slots=2, context=150)
    engine.generate([Request([1, 2] * 60, SamplingParams(max_tokens=3), seed=0)])
    assert seen == {(True, True, True), (False, False, False)}


MOST = {"plain": 1, "suffix:4": 1, "eagle3:3": 1, "eagle3:4x3/8": 2, "parallel:4": 1}


@pytest.mark.parametrize(
    ("path", "most", "rules"),
    [
        ("triton", MOST, None),
        ("operators", MOST, None),
        ("triton", {"eagle3:3": 2}, DRAWN_CHAIN),
        ("triton", {"eagle3:3x2/6": 3}, DRAWN_TREE),
    ],
    ids=["fixed", "fixed, operators", "drawn chains", "drawn trees"],
    indirect=["path"],
)
def test_a_step_waits_a_few_times_at_any_batch(cuda, path, most, rules):
    engine = engine_for(to_cuda(model()), slots=12, context=60, rules=rules, collect_traces=True)
    for strategy, limit in most.items():
        engine.use_strategy(strategy)
        for count in (3, 12):
            wanted = [Request([1 + i, 2, 3], SamplingParams(max_tokens=9), seed=i) for i in range(count)]
            waits = max(waits_of_steps(cuda, engine, wanted), key=len)
            assert len(waits) <= limit, (strategy, count, waits)


def test_a_draft_of_any_depth_is_two_graphs(cuda):
    """One reads what was committed, one drafts; the rest is inputs and outputs of theirs."""
    engine = engine_for(to_cuda(model()), slots=4, context=60)
    launches: dict[str, set[int]] = {}

    def propose(*args, original=engine.speculation.propose):
        before, captured = cuda.mode.launches, engine.drafters["eagle3"].graphs.captures.keys
        draft = original(*args)
        if draft.nodes == args[0].nodes:
            launches.setdefault(str(args[0]), set()).add(cuda.mode.launches - before)
            assert engine.drafters["eagle3"].graphs.captures.keys == captured
        return draft

    engine.speculation.propose = propose
    for strategy in ("eagle3:2", "eagle3:4", "eagle3:3x3/6", "eagle3:4x3/8"):
        engine.use_strategy(strategy)
        engine.generate(requests(4))
    least = {strategy: min(counts) for strategy, counts in launches.items()}
    assert least == {"eagle3:2": 10, "eagle3:4": 10, "eagle3:3x3/6": 11, "eagle3:4x3/8": 11}
    assert max(map(max, launches.values())) <= 13  # a new page of the cache is published


def test_admissions_wait_once_for_all_and_traces_end_on_the_host(cuda):
    engine = engine_for(to_cuda(model()), slots=12, context=60, collect_traces=True)
    engine.use_strategy("eagle3:3")
    for count in (3, 12):
        cuda.mode.waits.clear()
        rollouts = engine.generate(requests(count))
        assert len([w for w in cuda.mode.waits if "_admit" in w.callers]) == 1
        assert len([w for w in cuda.mode.waits if "_finished" in w.callers]) <= 2 * count
        for rollout in rollouts:
            trace = rollout.trace
            found = {x.device.type for x in (trace.taps, trace.final, trace.refused_final)}
            assert found == {"cpu"}


@pytest.mark.parametrize("strategy", ["plain", "eagle3:2"])
def test_reading_and_reserving_take_memory_of_a_piece(cuda, path, strategy, monkeypatch):
    """The largest tensor does not grow with the texts; with torch's operators it is their scores."""
    monkeypatch.setattr(eagle3, "_READ_TOKENS", 96)
    largest = []
    engine = engine_for(to_cuda(model()), slots=3, context=450, prefill_tokens=64)
    engine.use_strategy(strategy)
    for length in (100, 400):
        cuda.mode.largest = 0, ""
        engine.generate([Request([1 + i] * length, SamplingParams(max_tokens=4)) for i in range(3)])
        largest.append(cuda.mode.largest)
    assert largest[1][0] <= (1 if path == "triton" else 450 / 100) * largest[0][0], largest


def test_every_drafter_keeps_to_one_device(cuda, monkeypatch):
    on_host = full_engine(model(layers=2), slots=4, context=60)
    for build in ("tiny_eagle3", "tiny_llama"):
        original = getattr(engines, build)
        monkeypatch.setattr(engines, build, lambda *a, original=original, **k: to_cuda(original(*a, **k)))
    engine = full_engine(to_cuda(model(layers=2)), slots=4, context=60)
    for name in ("ngram", "recycling", "stand", "consensus", "clasp", "draft_model", "composite"):
        assert tokens_of(engine, f"{name}:3", 3) == tokens_of(on_host, f"{name}:3", 3), name


def test_a_cpu_tensor_that_meets_a_cuda_one_fails():
    with fake_cuda() as cuda:
        x = torch.ones(3, device="cuda")
        with pytest.raises(DeviceMixError, match=r"cuda:0 \(3,\), cpu \(3,\)"):
            x + torch.ones(3)
        assert (x + torch.tensor(2.0)).sum().item() == 9, "numbers may meet any device"
        assert len(cuda.mode.mixes) == 1
        engine = engine_for(to_cuda(model()), slots=4, context=60)
        engine.use_strategy("eagle3:3")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(engine_module, "upload", lambda values, device: torch.as_tensor(values))
            with pytest.raises(DeviceMixError):
                engine.generate(requests(2))


def test_an_added_wait_shows(cuda, monkeypatch):
    engine = engine_for(to_cuda(model()), slots=4, context=60)
    fine = waits_of_steps(cuda, engine, requests(3))
    follow = TritonKernels.follow

    def impatient(kernels: TritonKernels, logits: torch.Tensor, *args: Any):
        assert float(logits[0, 0]) < 1e9
        return follow(kernels, logits, *args)

    monkeypatch.setattr(TritonKernels, "follow", impatient)
    worse = waits_of_steps(cuda, engine, requests(3))
    assert max(map(len, fine)) == 1 and max(map(len, worse)) == 2
    assert any("_local_scalar_dense" in w.what for w in worse[0])


def test_nothing_is_collected_during_a_capture():
    """An engine that is gone may be collected at any allocation: its graphs would fail the capture."""
    with fake_cuda():
        collects = []
        CudaCapturer(torch.device("cuda:0")).capture(lambda: collects.append(gc.isenabled()))
    assert collects[-1] is False
    assert gc.isenabled()


def test_captures_refuse_to_wait_and_replay_what_they_recorded():
    with fake_cuda():
        x, out = torch.ones(2, device="cuda"), torch.zeros(2, device="cuda")
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out.copy_(x * 2)
        x.fill_(5)
        graph.replay()
        assert out.tolist() == [10, 10]
        for illegal in (lambda: out.cpu(), lambda: torch.ones(2).to("cuda"), lambda: out.sum().item()):
            with pytest.raises(IllegalCaptureError), torch.cuda.graph(torch.cuda.CUDAGraph()):
                illegal()
