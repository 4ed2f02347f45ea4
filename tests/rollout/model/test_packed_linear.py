"""The engine runs the trainer's parameters, in whatever precision."""

import pytest
import torch

from paceline.rollout import Request, RolloutEngine, SamplingParams
from paceline.rollout.model.packed_linear import can_pack
from tests.engines import engine_for, tiny_llama

GREEDY = Request([1, 2, 3], SamplingParams(temperature=0, max_tokens=20))


def test_float32_shares_parameters_and_leaves_the_trainer_alone():
    model, other = tiny_llama(seed=0), tiny_llama(seed=5)
    attention = model.config._attn_implementation
    engine = engine_for(model)
    expected = engine_for(other).generate([GREEDY])[0].token_ids
    model.load_state_dict(other.state_dict())
    assert engine.generate([GREEDY])[0].token_ids == expected, (
        "an update needs a refresh although the dtypes agree"
    )
    assert model.config._attn_implementation == attention
    assert not any(m._forward_pre_hooks for m in model.modules())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_update_reaches_the_engine(dtype):
    model, other = tiny_llama(seed=0), tiny_llama(seed=5)
    engine = RolloutEngine(model, dtype=dtype, max_slots=2, max_context=64)
    before = engine.generate([GREEDY])[0].token_ids
    model.load_state_dict(other.state_dict())
    engine.refresh_weights()
    after = engine.generate([GREEDY])[0].token_ids
    expected = RolloutEngine(other, dtype=dtype, max_slots=2, max_context=64).generate([GREEDY])[0].token_ids
    assert after == expected != before


def test_parameters_that_have_moved_reach_the_engine():
    """Wrapping a module for training may give its parameters other storage, as accelerate does for DDP on a
    CPU.
    """
    model, other = tiny_llama(seed=0), tiny_llama(seed=5)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.2, 3.0)
    engine = RolloutEngine(model, dtype=torch.float32, max_slots=2, max_context=64)
    for parameter in model.parameters():
        parameter.data = parameter.data.clone()
    model.load_state_dict(other.state_dict())
    engine.refresh_weights()
    expected = RolloutEngine(other, dtype=torch.float32, max_slots=2, max_context=64).generate([GREEDY])[0]
    assert engine.generate([GREEDY])[0].logprobs == expected.logprobs


@pytest.mark.skipif(
    not can_pack(torch.device("cpu"), torch.bfloat16), reason="no bfloat16 kernels for this CPU"
)
def test_packed_bfloat16_stays_near_the_trainers_forward():
    """The bfloat16 engine's log-probs differ from the float32 forward by rounding only."""
    model = tiny_llama(sharpness=4.0)
    engine = RolloutEngine(model, dtype=torch.bfloat16, max_slots=4, max_context=64)
    for rollout in engine.generate(
        [Request([1, 2, i], SamplingParams(max_tokens=20), seed=i) for i in range(4)]
    ):
        ids = torch.tensor([[*rollout.request.prompt_ids, *rollout.token_ids]])
        with torch.no_grad():
            full = torch.log_softmax(model(ids).logits[0, 2:-1], -1).gather(-1, ids[0, 3:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), full, rtol=0, atol=0.05)


def test_slots_are_relaid_when_sequences_outgrow_the_span():
    """Contexts past 128 and past 256 force two relayouts with other sequences in flight."""
    model = tiny_llama()
    engine = engine_for(model, slots=3, context=400)
    requests = [
        Request([i, 2, 3], SamplingParams(temperature=0, max_tokens=n))
        for i, n in enumerate((300, 90, 200, 40))
    ]
    for request, rollout in zip(requests, engine.generate(requests), strict=True):
        prompt = torch.tensor([list(request.prompt_ids)])
        made = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=request.params.max_tokens,
            do_sample=False,
        )
        assert rollout.token_ids == made[0, 3:].tolist()
