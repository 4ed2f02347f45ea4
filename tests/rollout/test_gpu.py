"""What only a GPU can show: captured graphs give generate's tokens, follow updates, and do not wait."""

import pytest
import torch

from paceline.rollout import Request, SamplingParams, Strategy
from tests.engines import engine_for, tiny_llama

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


def greedy_requests() -> list[Request]:
    return [
        Request([1 + i, 2, 3], SamplingParams(temperature=0, max_tokens=10 + 3 * i), group=i % 2)
        for i in range(12)
    ]


@pytest.mark.parametrize(
    "strategy",
    ["plain", Strategy("suffix", 4), Strategy("eagle3", 3), "eagle3:4x3/8", "suffix:4x2/6", "adaptive"],
    ids=str,
)
def test_graphs_give_the_tokens_of_generate(strategy):
    model = tiny_llama().cuda()
    engine = engine_for(model)
    engine.use_strategy(strategy)
    for request, rollout in zip(greedy_requests(), engine.generate(greedy_requests()), strict=True):
        prompt = torch.tensor([list(request.prompt_ids)]).cuda()
        made = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.params.max_tokens,
            do_sample=False,
        )
        assert rollout.token_ids == made[0, 3:].tolist()
    assert sum(engine.runner.graphs.replays.values()) > 0
    assert not engine.runner.graphs.fallbacks


def test_an_update_reaches_the_graphs():
    model, other = tiny_llama(seed=0).cuda(), tiny_llama(seed=5).cuda()
    engine = engine_for(model)
    expected = [r.token_ids for r in engine_for(other).generate(greedy_requests())]
    engine.generate(greedy_requests())
    model.load_state_dict(other.state_dict())
    engine.refresh_weights()
    assert [r.token_ids for r in engine.generate(greedy_requests())] == expected


@pytest.mark.parametrize("count", [3, 12])
@pytest.mark.parametrize(("strategy", "most"), [("plain", 1), ("eagle3:3", 2), ("eagle3:4x3/8", 3)])
def test_a_step_waits_a_few_times_at_any_batch(strategy, most, count):
    from paceline.benchmarks.gpu.shapes import syncs_of_step

    engine = engine_for(tiny_llama().cuda(), slots=12, collect_traces=True)
    engine.use_strategy(strategy)
    requests = [Request([1 + i, 2, 3], SamplingParams(max_tokens=40), seed=i) for i in range(count)]
    admissions_and_traces = (2 + 3 * count) / 40
    assert syncs_of_step(engine, requests) <= most + admissions_and_traces
