"""The rollout engine alone: eight samples of one prompt, decoded with adaptive speculation."""

from transformers import AutoModelForCausalLM, AutoTokenizer

from paceline import Request, RolloutEngine, SamplingParams
from paceline.rl.models.policies import fetch_policy
from paceline.rollout.drafters import SuffixDrafter

path = fetch_policy("tiny-llama")  # or a directory, or a Hugging Face id
model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)

engine = RolloutEngine(model, max_slots=8, max_context=256)
engine.add_drafter(SuffixDrafter())
engine.use_strategy("adaptive")  # or "plain", "suffix:4" (a chain), "suffix:4x3/8" (a tree)

prompt = tokenizer("1 + 2 =")["input_ids"]
requests = [Request(prompt, SamplingParams(max_tokens=32), seed=i, group="sum") for i in range(8)]
for rollout in engine.stream(requests):  # engine.generate(requests) keeps their order instead
    stats = rollout.stats
    print(f"{len(rollout.token_ids)} tokens in {stats.steps} steps: {tokenizer.decode(rollout.token_ids)!r}")
