"""What training takes of a GPU, by hand, and a recipe that is refused before its weights are loaded."""

import pytest
import torch

from paceline.rl.dry_run.devices import published_gpu
from paceline.rl.dry_run.estimate import KEYS_AND_VALUES, estimate, policy_config
from paceline.rl.errors import UserError
from paceline.rl.memory.activations import drafter_activations
from paceline.rl.memory.gpu import check_memory, trainer_memory
from paceline.rl.recipe import load_config
from paceline.rollout import default_tap_layers
from paceline.rollout.drafters.eagle3_model import eagle3_config
from tests.support import ROOT

TINY, SEVEN = ROOT / "configs" / "tiny.yaml", ROOT / "configs" / "zero3_8gpu.yaml"
POLICY = policy_config("tiny-llama")  # 64 wide, 4 layers
PARAMETERS = (
    4 * (64 * 64 * 2 + 64 * 32 * 2 + 3 * 64 * 128 + 2 * 64)
    + 64
    + POLICY.vocab_size * 64 * (1 if POLICY.tie_word_embeddings else 2)
)


def test_an_update_by_hand():
    config = load_config(
        TINY, ["speculation.drafters=[suffix]", "update.tokens_per_microbatch=100", "update.kl_coef=0"]
    )
    assert config.policy.mixed_precision != "bf16"
    assert trainer_memory(config, POLICY, 1) == {
        "gradients": 4 * PARAMETERS,
        "Adam's moments": 8 * PARAMETERS,
        # per token in float32: two norms keep three values a hidden unit, attention 64 queries and
        # outputs and 32 keys and values, the MLP four of 128, and checkpoints the input of each of four
        # layers; the head has four matrices of logits, and three of its weights
        "activations of a micro-batch": 4
        * (100 * (6 * 64 + 2 * (64 + 32) + 4 * 128 + 4 * 64) + POLICY.vocab_size * (100 * 4 + 64 * 3)),
    }
    assert config.policy.gradient_checkpointing


def test_weights_that_the_engine_does_not_share_are_the_trainers():
    config = load_config(TINY, ["scale.fsdp2=true"])
    taken = trainer_memory(config, POLICY, 4)
    assert taken["weights"] == -(-4 * PARAMETERS // 4)
    assert "engine's copy of the weights" not in taken


def test_drafter_training_by_hand():
    config = load_config(TINY, ["drafter.tokens_per_microbatch=1000", "drafter.unroll=3"])
    shape = eagle3_config(POLICY, 50, default_tap_layers(4))
    # each of 3 positions: 3 · 50 probabilities and 17 · 64 of a layer; the batch: 50 and 3 taps of 64
    values = 1000 * (3 * (3 * 50 + 17 * 64) + 50 + 3 * 64)
    # a completion of at most 24 tokens is assumed to have 12, and the context of each the 160 tokens of the
    # longest text; the scores of 4 heads, 3 of the positions and 3 in work
    contexts, scores = 84 * 160 * (3 + 7) * 64, (3 + 3) * 4 * 1000 * (12 + 160)
    assert drafter_activations(config, shape) == 4 * (values + contexts + scores)
    half = load_config(
        TINY, ["drafter.tokens_per_microbatch=1000", "drafter.unroll=3", "policy.mixed_precision=bf16"]
    )
    assert drafter_activations(half, shape) == 4 * (values + contexts)
    none = load_config(TINY, ["drafter.tokens_per_microbatch=1000", "drafter.context_tokens=0"])
    assert drafter_activations(none, shape) < drafter_activations(config, shape)
    # 0.7 and 0.49 of the anchors at the further positions of drafts in one pass
    more, parallel = (
        drafter_activations(load_config(TINY, ["drafter.tokens_per_microbatch=1000", *other]), shape)
        - drafter_activations(config, shape)
        for other in (["drafter.unroll=4"], ["drafter.unroll=3", "drafter.parallel_positions=3"])
    )
    assert parallel == pytest.approx((0.7 + 0.49) * more, abs=8)
    # its peak counts only beyond the update's, since the two never coincide
    small = load_config(TINY, ["drafter.tokens_per_microbatch=16", "update.tokens_per_microbatch=8192"])
    assert trainer_memory(small, POLICY, 1)["drafter's activations, beyond an update's"] == 0


def test_the_drafters_cache_by_hand():
    config = load_config(TINY, ["rollout.max_slots=6", "rollout.dtype=bfloat16"])
    slot = config.rollout.max_context + config.speculation.max_nodes + 2 + 63
    assert trainer_memory(config, POLICY, 1)["drafter's keys and values"] == 6 * slot * 2 * 32 * 2


def test_the_plan_gives_keys_and_values_what_the_dry_run_says():
    config, policy = load_config(SEVEN), policy_config(load_config(SEVEN).policy.model)
    dense = load_config(SEVEN, ["drafter.tokens_per_microbatch=8192", "policy.mixed_precision=no"])
    with pytest.raises(UserError, match=r"drafter's activations, beyond an update's 8"):
        check_memory(dense, policy, 8, 80_000_000_000)
    plan = check_memory(config, policy, 8, 80_000_000_000)
    said = estimate(config, policy, 8, published_gpu(80))
    assert plan.cache == said.size(KEYS_AND_VALUES) + said.size("libraries")
    assert sum(plan.parts.values()) + plan.cache == plan.room


def test_what_does_not_fit_is_refused_before_weights_are_loaded():
    config, policy = load_config(SEVEN), policy_config(load_config(SEVEN).policy.model)
    with pytest.raises(
        UserError, match=r"^the GPU's 80 GB do not hold .* Adam's moments 60.9, .*scale.fsdp2=true"
    ):
        check_memory(config, policy, 1, 80_000_000_000)
    limited = load_config(SEVEN, ["rollout.kv_memory_gb=60"])
    with pytest.raises(UserError, match=r"60 GB of keys and values \(rollout.kv_memory_gb\)"):
        check_memory(limited, policy, 8, 80_000_000_000)


def test_the_trainer_refuses_on_a_gpu(monkeypatch, tmp_path):
    """The whole command: the recipe is refused with one line, and no policy has been loaded."""
    from paceline.rl import trainer

    loaded = []
    monkeypatch.setattr(trainer, "trained_policy", lambda *args: loaded.append(args))
    monkeypatch.setattr(trainer, "process_room", lambda device: 1_000_000)
    made = trainer.Trainer.__new__(trainer.Trainer)
    made.config, made.source = load_config(TINY), tmp_path
    POLICY.save_pretrained(tmp_path)

    class Accelerator:
        device, num_processes = torch.device("cuda"), 1

    made.accelerator = Accelerator()
    with pytest.raises(UserError, match=r"^the GPU's 0.001 GB"):
        made._check_memory()
    assert not loaded
