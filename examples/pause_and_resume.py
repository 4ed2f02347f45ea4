"""Partial rollouts: stop after some tokens, update the policy, continue where each sample stopped."""

from dataclasses import replace

from transformers import AutoModelForCausalLM

from paceline import Request, RolloutEngine, SamplingParams
from paceline.rl.models.policies import fetch_policy
from paceline.rollout import FinishReason

model = AutoModelForCausalLM.from_pretrained(fetch_policy("tiny-llama"))
engine = RolloutEngine(model, max_slots=4, max_context=256)
requests = [Request([5, 6, 7], SamplingParams(max_tokens=64), seed=i) for i in range(8)]

rollouts = engine.generate(requests, token_budget=100)  # stops after about 100 tokens
paused = [r for r in rollouts if r.finish_reason is FinishReason.PAUSED]
print(f"{len(paused)} of {len(rollouts)} samples are paused")

# ... a training step changes the model's parameters here ...
engine.refresh_weights()

resumed = engine.generate([replace(r.request, resume=r) for r in paused])
for rollout in resumed:  # segments: how many tokens were drawn under which version of the policy
    assert sum(count for _, count in rollout.segments) == len(rollout.token_ids) == len(rollout.logprobs)
    print(rollout.finish_reason, rollout.segments)
