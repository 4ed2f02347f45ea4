"""What a recipe's check tells of a policy, on a small model of its kind."""

import pytest
from transformers import AutoConfig

from paceline.rl.dry_run.description import describe
from paceline.rl.dry_run.tiny_policy import check_policy, tiny_policy
from paceline.rl.errors import UserError
from paceline.rl.recipe import load_config
from tests.support import ROOT

RUNS = ["gpt2", "opt", "gemma3", "llama4_text", "phi3", "qwen3_moe"]
REFUSED = [
    ("deepseek_v3", "stores keys and values of several shapes"),
    ("gpt_oss", "uses attention sinks"),
    ("mamba", "does not let its attention be replaced"),
    ("bloom", "does not let its attention be replaced"),
    ("minimax", "layers of type linear_attention"),
    ("gemma4", "do not have one key shape for all layers"),
    ("gemma2", "caps or scales its logits"),
    ("bart", "has an encoder"),
    ("qwen2_vl", "no causal language model of model_type 'qwen2_vl'"),
]


@pytest.mark.parametrize("kind", RUNS)
def test_a_policy_that_runs_passes_at_its_published_size(kind):
    config = AutoConfig.for_model(kind)
    assert check_policy(config, max_context=1000) is None
    small = tiny_policy(config)
    assert small.num_parameters() < 2e7
    assert config.get_text_config().num_hidden_layers > small.config.num_hidden_layers, (
        "the policy's own config was made small"
    )


@pytest.mark.parametrize(("kind", "reason"), REFUSED)
def test_a_policy_that_cannot_run_is_a_line(kind, reason):
    with pytest.raises(UserError, match=reason) as caught:
        check_policy(AutoConfig.for_model(kind), max_context=1000)
    assert "\n" not in str(caught.value)


def test_a_context_past_the_policys_length_is_a_line():
    with pytest.raises(
        UserError,
        match=r"rollout.max_context is 1025: GPT2LMHeadModel has no learned positions past 1024 tokens",
    ):
        check_policy(AutoConfig.for_model("gpt2"), max_context=1025)


def test_a_config_that_cannot_be_made_small_is_left_to_the_run():
    config = AutoConfig.for_model("deepseek_v2")  # whose routers have no number of experts by default
    assert "no small model of model_type deepseek_v2 could be made" in str(
        check_policy(config, max_context=1000)
    )


def test_dry_run_refuses_what_a_run_would(tmp_path):
    AutoConfig.for_model("gpt_oss").save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"weights are not read")
    config = load_config(ROOT / "configs" / "tiny.yaml", [f"policy.model={tmp_path}"])
    with pytest.raises(UserError, match="attention sinks"):
        describe(config, ROOT / "configs" / "tiny.yaml", 1)
