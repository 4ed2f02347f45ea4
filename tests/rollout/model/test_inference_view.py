"""The engine decodes with the policy's classes, whatever a trainer has put on its instances."""

import types

import torch

from paceline.rollout import Request, RolloutEngine, SamplingParams
from tests.engines import tiny_llama


def test_forwards_and_hooks_of_the_trainer_stay_with_it():
    model = tiny_llama(sharpness=4.0)
    request = Request([5, 6, 7], SamplingParams(max_tokens=12), seed=1)
    wanted = RolloutEngine(model, dtype=torch.float32, max_slots=2, max_context=64).generate([request])[0]
    seen = []
    original = model.forward

    def fused_loss(self, *args, **kwargs):
        seen.append("forward")
        return original(*args, **kwargs)

    model.forward = types.MethodType(fused_loss, model)
    model.lm_head.register_forward_hook(lambda module, args, output: output * 0)
    model.model.layers[0].register_forward_pre_hook(lambda module, args: seen.append("hook"))
    found = RolloutEngine(model, dtype=torch.float32, max_slots=2, max_context=64).generate([request])[0]
    assert found.token_ids == wanted.token_ids
    assert not seen
    assert (model(torch.tensor([[5, 6]])).logits == 0).all()
    assert seen
