"""What --dry-run tries: the recipe's own settings on a tiny policy of the same kind."""

import json

import pytest
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    Qwen3Config,
)

from paceline.rl.dry_run.tiny_copy import LAYERS, tiny_config
from paceline.rl.dry_run.tiny_step import try_tiny_step
from paceline.rl.errors import UserError
from paceline.rl.recipe import load_config
from tests.support import ROOT

TINY = ROOT / "configs" / "tiny.yaml"


@pytest.mark.parametrize(
    "policy",
    [
        LlamaConfig(hidden_size=4096, num_key_value_heads=8, num_attention_heads=32, head_dim=128),
        Qwen3Config(
            num_hidden_layers=36,
            layer_types=["full_attention"] * 35 + ["sliding_attention"],
            sliding_window=128,
        ),
        MixtralConfig(num_local_experts=8),
        Phi3Config(
            hidden_size=3072,
            original_max_position_embeddings=4096,
            max_position_embeddings=131072,
            rope_parameters={
                "rope_type": "longrope",
                "rope_theta": 10000.0,
                "short_factor": [1.0] * 48,
                "long_factor": [2.0] * 48,
                "original_max_position_embeddings": 4096,
            },
        ),
        GPT2Config(n_embd=1600, n_layer=48, n_head=25),
    ],
    ids=lambda config: config.model_type,
)
def test_a_tiny_copy_is_of_the_same_kind_and_small(policy):
    tiny = tiny_config(policy)
    model = AutoModelForCausalLM.from_config(tiny)
    assert type(model) is AutoModelForCausalLM._model_mapping[type(policy)]
    text = tiny.get_text_config()
    assert (
        text.num_hidden_layers == LAYERS and text.hidden_size == 64 and text.vocab_size == policy.vocab_size
    )
    assert (
        sum(p.numel() for name, p in model.named_parameters() if "embed" not in name and "head" not in name)
        < 20_000_000
    )
    kinds = getattr(policy, "layer_types", None)
    assert kinds is None or set(tiny.layer_types) == set(kinds)
    assert AutoConfig.for_model(**tiny.to_dict()).num_hidden_layers == LAYERS  # as it is read back


@pytest.mark.ci
def test_what_was_tried_is_said(tmp_path, tmp_path_factory, monkeypatch):
    """Evaluations of held-out rows too: they are tried on the rows that the run would hold out."""
    rows = tmp_path_factory.mktemp("data") / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"prompt": f"{i} + 1 =", "answer": str(i + 1)}) + "\n" for i in range(40))
    )
    task = [
        "task.source=jsonl",
        f"task.path={rows}",
        "task.datasets=[]",
        "task.heldout=0.2",
        "eval_every=50",
        "keep_best=true",
    ]
    monkeypatch.chdir(tmp_path)
    said = try_tiny_step(load_config(TINY, task))
    assert "3 steps of 2 prompts × 4 samples" in said and "drafts by suffix, eagle3, composite" in said
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("broken", "says"),
    [
        (
            "paceline.rl.learner.updater.PolicyUpdater.run",
            r"fails \(update, with policy.mixed_precision; rl/.*RuntimeError: no such kernel",
        ),
        (
            "paceline.drafter_trainer.learner.DrafterLearner.update",
            r"fails \(drafter, with rollout.dtype and .*RuntimeError: no such kernel",
        ),
        ("paceline.rl.trainer.save_checkpoint", r"fails.*RuntimeError: no such kernel"),
    ],
)
@pytest.mark.ci
def test_what_fails_is_one_line_with_its_keys(monkeypatch, broken, says):
    def fails(*arguments, **options):
        raise RuntimeError("no such\nkernel")

    monkeypatch.setattr(broken, fails)
    with pytest.raises(UserError, match=says) as refused:
        try_tiny_step(load_config(TINY))
    assert "\n" not in str(refused.value)
