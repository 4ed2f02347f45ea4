"""Stop strings of a recipe end a completion where its text has them, special tokens included."""

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from paceline.rl.generation.worker import RolloutWorker
from paceline.rl.models.policies import fetch_policy
from paceline.rl.recipe import load_config
from paceline.rollout import FinishReason, Request, SamplingParams
from paceline.rollout.backends.vllm_conversion import sampling


@pytest.fixture(scope="module")
def worker() -> RolloutWorker:
    source = fetch_policy("tiny-llama")
    plain = ["speculation.drafters=[suffix]", "speculation.strategy=suffix:2"]
    tokenizer = AutoTokenizer.from_pretrained(source)
    return RolloutWorker(
        load_config("configs/tiny.yaml", plain),
        AutoModelForCausalLM.from_pretrained(source).eval(),
        tokenizer,
    )


@pytest.mark.parametrize("where", ["alone", "after a letter"])
def test_a_special_token_stops(worker, where):
    """Tokens are drawn evenly, so that one in 99 is the special one."""
    tokenizer = worker._tokenizer
    special = tokenizer.unk_token_id
    requests = [Request([5, 6], SamplingParams(temperature=1e30, max_tokens=60), seed=i) for i in range(16)]
    free = [r.token_ids for r in worker.engine.generate(requests)]
    at = next((ids, i) for ids in free for i, token in enumerate(ids) if token == special and i > 0)
    before = tokenizer.decode([at[0][at[1] - 1]])
    wanted = tokenizer.unk_token if where == "alone" else before + tokenizer.unk_token
    params = SamplingParams(temperature=1e30, max_tokens=60, stop_strings=(wanted,))
    stopped = 0
    for whole, r in zip(
        free, worker.engine.generate([Request(q.prompt_ids, params, q.seed) for q in requests]), strict=True
    ):
        assert r.token_ids == whole[: len(r.token_ids)]
        text = tokenizer.decode(r.token_ids, skip_special_tokens=False)
        if r.finish_reason is FinishReason.STOP:
            stopped += 1
            assert text.endswith(wanted) and r.token_ids[-1] == special
            assert len(r.logprobs) == len(r.token_ids)
        else:
            assert wanted not in text and r.token_ids == whole
    assert stopped > 0


def test_vllm_looks_for_special_tokens_too():
    asked = sampling(Request([1], SamplingParams(stop_strings=("<|im_end|>",))))
    assert asked["stop"] == ["<|im_end|>"] and asked["skip_special_tokens"] is False
    assert "skip_special_tokens" not in sampling(Request([1]))
