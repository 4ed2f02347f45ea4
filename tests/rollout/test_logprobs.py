"""Returned log-probs are those of a separate full forward."""

import pytest
import torch

from paceline.rollout import PLAIN, Request, SamplingParams, Strategy
from paceline.rollout.drafters import DraftRules
from paceline.rollout.sampling import processed_probs
from tests.engines import engine_for, tiny_llama

PARAMS = [SamplingParams(max_tokens=25), SamplingParams(temperature=0.7, top_k=30, top_p=0.9, max_tokens=25)]


@pytest.mark.parametrize("params", PARAMS, ids=["T=1", "T=0.7 top-k top-p"])
@pytest.mark.parametrize(
    "strategy",
    [
        PLAIN,
        Strategy("suffix", 4),
        Strategy("eagle3", 3),
        Strategy("eagle3", 3, 2, 5),
        Strategy("adversarial", 3),
    ],
    ids=str,
)
def test_equal_a_full_forward(strategy, params):
    model = tiny_llama(97, sharpness=4.0)
    engine = engine_for(model, rules=DraftRules("static", "replacement"), collect_entropies=True)
    engine.use_strategy(strategy)
    for rollout in engine.generate([Request([3, 1, 4, 1, 5, i], params, seed=i, group=0) for i in range(12)]):
        ids = torch.tensor([[*rollout.request.prompt_ids, *rollout.token_ids]])
        with torch.no_grad():
            logits = model(ids).logits[:, 5:-1]
        probs = processed_probs(logits, [params])[0]
        reference = probs.gather(-1, ids[0, 6:, None])[:, 0].log()
        torch.testing.assert_close(torch.tensor(rollout.logprobs), reference, rtol=0, atol=1e-4)
        entropies = -torch.where(probs > 0, probs * probs.log(), 0.0).sum(-1)
        torch.testing.assert_close(torch.tensor(rollout.entropies), entropies, rtol=0, atol=1e-3)


def test_greedy_reports_unscaled_logprobs_also_in_a_mixed_batch():
    model = tiny_llama(97, sharpness=4.0)
    engine = engine_for(model)
    greedy = Request([3, 1, 4], SamplingParams(temperature=0, max_tokens=10))
    mixed = engine.generate([greedy, Request([2, 7], SamplingParams(max_tokens=10), seed=1)])
    ids = torch.tensor([[3, 1, 4, *mixed[0].token_ids]])
    with torch.no_grad():
        reference = torch.log_softmax(model(ids).logits[0, 2:-1], -1).gather(-1, ids[0, 3:, None])[:, 0]
    torch.testing.assert_close(torch.tensor(mixed[0].logprobs), reference, rtol=0, atol=1e-4)
    assert engine.generate([greedy])[0].token_ids == mixed[0].token_ids


def test_traces_hold_what_a_full_forward_computes():
    model = tiny_llama(97)
    engine = engine_for(model, collect_traces=True)
    engine.use_strategy(Strategy("suffix", 3))
    rollout = engine.generate([Request([3, 1, 4], SamplingParams(max_tokens=12), seed=0)])[0]
    trace = rollout.trace
    assert trace.token_ids.tolist() == [3, 1, 4, *rollout.token_ids]
    with torch.no_grad():
        out = model(trace.token_ids[None, :-1], output_hidden_states=True)
    taps = torch.cat([out.hidden_states[i][0] for i in engine.runner.tap_layers], -1)
    torch.testing.assert_close(trace.taps, taps, rtol=0, atol=1e-4)
    torch.testing.assert_close(trace.final[2:], out.hidden_states[-1][0, 2:], rtol=0, atol=1e-4)
