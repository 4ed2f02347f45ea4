"""A drafter of your own: whatever it proposes, the completions are the same as without it."""

import torch
from transformers import AutoModelForCausalLM

from paceline import Request, RolloutEngine, SamplingParams
from paceline.rl.models.policies import fetch_policy
from paceline.rollout.drafters.base import StatelessSlots
from paceline.rollout.trees import DraftTree


class RepeatDrafter(StatelessSlots):
    """Proposes the last token again and again."""

    name = "repeat"

    def propose(self, context, strategy):
        """Returns a chain of ``strategy.depth`` tokens for each sequence."""
        tokens = torch.tensor([[s.tokens[-1]] * strategy.depth for s in context.sequences])
        return DraftTree(tokens, torch.full((len(tokens),), strategy.depth))


model = AutoModelForCausalLM.from_pretrained(fetch_policy("tiny-llama"))
engine = RolloutEngine(model, dtype=torch.float32, max_slots=4, max_context=128)
engine.add_drafter(RepeatDrafter())
requests = [Request([5, 6, 7], SamplingParams(max_tokens=48), seed=i) for i in range(4)]

plain = engine.generate(requests)
engine.use_strategy("repeat:3")
drafted = engine.generate(requests)
assert [r.token_ids for r in drafted] == [r.token_ids for r in plain]
stats = [r.stats for r in drafted]
print(f"{sum(s.accepted for s in stats)} of {sum(s.drafted for s in stats)} draft tokens were accepted")
