"""The update on the engine's kernels: log-probs are the rollouts' to the bit, gradients those of float32."""

import copy

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    MistralConfig,
    PretrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from paceline.rl.config.scale import ScaleConfig
from paceline.rl.errors import UserError
from paceline.rl.learner.critic import ValueModel
from paceline.rl.learner.fused.fused_policy import FusedPolicy, UnsupportedPolicy
from paceline.rl.learner.log_probs import PolicyLogProbs
from paceline.rl.learner.packing import PackedBatch, PromptRow, Sample, pack
from paceline.rl.models.loading import recompute_activations
from paceline.rl.process import process_tuning
from paceline.rl.recipe import load_config
from paceline.rl.sharding import AdamWSettings, shard
from paceline.rollout import Request, RolloutEngine, SamplingParams
from paceline.rollout.drafters import SuffixDrafter
from paceline.rollout.model.packed_linear import PackedLinear
from paceline.rollout.native.products import load_products
from tests.engines import tiny_llama
from tests.support import ROOT, tiny_trainer

pytestmark = pytest.mark.skipif(load_products() is None, reason="no C++ compiler")

IN_BFLOAT16 = ("rollout.dtype=bfloat16", "policy.mixed_precision=bf16")
SIZES = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "pad_token_id": 0,
}
FAMILIES: dict[str, PretrainedConfig] = {
    "llama": LlamaConfig(**SIZES),
    "tied": LlamaConfig(**SIZES | {"vocab_size": 128, "tie_word_embeddings": True}),
    "biases": LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SIZES),
    "qwen3": Qwen3Config(**SIZES),
    "window": MistralConfig(**SIZES, sliding_window=7),
}


def policy_of(config: PretrainedConfig):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():  # biases and gains would hide in zeros and ones
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def batch_of(*shape: tuple[int, ...], vocabulary: int = 97) -> PackedBatch:
    generator, rows, index = torch.Generator().manual_seed(1), [], 0
    for prompt, *samples in shape:
        tokens = [
            torch.randint(0, vocabulary, (n,), generator=generator).tolist() for n in (prompt, *samples)
        ]
        rows.append(PromptRow(tokens[0], tuple(Sample(index + i, t) for i, t in enumerate(tokens[1:]))))
        index += len(samples)
    return pack(rows)


BATCH = batch_of((5, 7, 30, 1), (1, 4), (40, 9, 12))


def in_bfloat16(module: PolicyLogProbs, batch: PackedBatch, temperature: float = 0.8):
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return module(batch, temperature, True)


def gradients(model, outputs) -> torch.Tensor:
    """The gradient of a loss of log-probs and entropies, all parameters end to end."""
    model.zero_grad()
    logprobs, entropies = outputs
    (logprobs * torch.linspace(-1, 1, len(logprobs)) + 0.1 * entropies).sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def error(found: torch.Tensor, exact: torch.Tensor) -> float:
    return float((found - exact).norm() / exact.norm())


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_are_float32s_up_to_rounding(family, monkeypatch):
    """As near to them as under autocast, whose residual stream is float32, or less than twice as far."""
    monkeypatch.setattr(process_tuning, "multiplies_bfloat16", lambda device: True)
    model = policy_of(FAMILIES[family])
    plain, fused = PolicyLogProbs(copy.deepcopy(model), fuse=False), PolicyLogProbs(model)
    exact_outputs = plain(BATCH, 0.8, True)
    exact = gradients(plain, exact_outputs)
    cast = gradients(plain, in_bfloat16(plain, BATCH))
    outputs = in_bfloat16(fused, BATCH)
    assert isinstance(fused._fused, FusedPolicy)
    for found, expected in zip(outputs, exact_outputs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0.05)
    assert error(gradients(fused, outputs), exact) < 2 * error(cast, exact)


@pytest.mark.parametrize(
    ("instructions", "dtype"), [(True, torch.bfloat16), (False, torch.float32)], ids=["with", "without"]
)
def test_modules_compute_in_what_torch_multiplies_fast(monkeypatch, instructions, dtype):
    """Torch has instructions for bfloat16 on few processors; the critic never runs on the kernels."""
    monkeypatch.setattr(process_tuning, "multiplies_bfloat16", lambda device: instructions)
    model = policy_of(FAMILIES["tied"])
    policy, critic = PolicyLogProbs(copy.deepcopy(model), fuse=False), ValueModel(model)
    seen = set()
    for module in (policy, critic):
        for layer in module.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.register_forward_hook(lambda _layer, _inputs, out: seen.add(out.dtype))
    in_bfloat16(policy, BATCH)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        critic(BATCH).sum().backward()
    assert seen == {dtype}


def test_gradients_add_up_over_micro_batches():
    """Also those that are there already, to which the kernels add in place."""
    module = PolicyLogProbs(policy_of(FAMILIES["tied"]))
    first, second = batch_of((5, 7, 30)), batch_of((9, 3), (4, 8))
    alone = [gradients(module, in_bfloat16(module, batch)) for batch in (first, second)]
    module.zero_grad(set_to_none=True)
    for batch in (first, second):
        logprobs, entropies = in_bfloat16(module, batch)
        (logprobs * torch.linspace(-1, 1, len(logprobs)) + 0.1 * entropies).sum().backward()
    together = torch.cat([p.grad.flatten() for p in module.parameters()])
    torch.testing.assert_close(together, alone[0] + alone[1], rtol=1e-5, atol=1e-6)


def test_recomputed_activations_give_the_same_gradients():
    model = policy_of(FAMILIES["qwen3"])
    kept = PolicyLogProbs(copy.deepcopy(model))
    recompute_activations(model)
    module = PolicyLogProbs(model).train()
    expected = gradients(kept, in_bfloat16(kept, BATCH))
    assert torch.equal(gradients(module, in_bfloat16(module, BATCH)), expected)


def test_more_logits_than_are_kept_give_the_same_gradients(monkeypatch):
    module = PolicyLogProbs(policy_of(FAMILIES["llama"]))
    expected = gradients(module, in_bfloat16(module, BATCH))
    monkeypatch.setattr("paceline.rl.learner.fused.head_scores._LOGITS_PER_CHUNK", 97 * 10)
    torch.testing.assert_close(gradients(module, in_bfloat16(module, BATCH)), expected, rtol=1e-5, atol=1e-6)


def test_new_weights_are_used_at_once():
    """After a step of the optimizer that runs train with, whose kernel changes weights in place."""
    accelerator = Accelerator(cpu=True)
    module = PolicyLogProbs(policy_of(FAMILIES["qwen2"]))
    trained = shard(module, ScaleConfig(), accelerator, AdamWSettings(1e-2, 0.0, 1.0, "bf16"))
    before, _ = in_bfloat16(trained.module, BATCH)
    trained.backward(before.sum())
    trained.step()
    after, _ = in_bfloat16(trained.module, BATCH)
    same = policy_of(FAMILIES["qwen2"])
    same.load_state_dict(module.policy.state_dict())
    anew, _ = in_bfloat16(PolicyLogProbs(same), BATCH)
    assert not torch.equal(after, before)
    assert torch.equal(after, anew)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("strategy", ["plain", "suffix:3"])
def test_log_probs_are_the_engines_to_the_bit(family, strategy):
    """Of drafted tokens, in a full batch, after temperatures, in any micro-batch."""
    model = policy_of(FAMILIES[family])
    engine = RolloutEngine(model, max_slots=5, max_context=160, max_nodes=4)
    engine.add_drafter(SuffixDrafter())
    engine.use_strategy(strategy)
    rollouts = engine.generate(
        [
            Request([5, 6, 5, 6, 7 + i % 3], SamplingParams(0.7, max_tokens=20 + 9 * i), seed=i, group=i % 3)
            for i in range(9)
        ]
    )
    module = PolicyLogProbs(model)
    for members in (range(9), range(0, 9, 3), [4]):
        groups: dict[tuple[int, ...], list[Sample]] = {}
        for i in members:
            sample = Sample(i, rollouts[i].token_ids)
            groups.setdefault(tuple(rollouts[i].request.prompt_ids), []).append(sample)
        batch = pack([PromptRow(prompt, tuple(samples)) for prompt, samples in groups.items()])
        logprobs, _ = in_bfloat16(module, batch, 0.7)
        for order, i in enumerate(batch.members):
            assert torch.equal(logprobs[batch.owner == order].detach(), torch.tensor(rollouts[i].logprobs))


@pytest.fixture
def no_accelerator():
    """accelerate keeps the precision of a process's first accelerator."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_rollouts_and_updates_hold_one_copy_of_the_packed_weights():
    model = policy_of(FAMILIES["llama"])
    fused = FusedPolicy(model)
    attention = model.model.layers[0].self_attn
    engine = RolloutEngine(model, dtype=torch.bfloat16, max_slots=1, max_context=32)
    shared = PackedLinear.shared(attention.q_proj, attention.k_proj, attention.v_proj)
    assert shared in engine.runner.view.fused[0]._projections
    assert shared is fused._layers[0]._qkv._packed


def test_importance_ratios_are_one_until_weights_change(tmp_path, monkeypatch, no_accelerator):
    """The gap between the trainer's log-probs and the engine's is exactly 0 in a run's first minibatch."""
    options = ["rollout.match_trainer=true", *IN_BFLOAT16]
    with tiny_trainer(tmp_path, monkeypatch, "[float('e' in c) for c in completions]", *options) as trainer:
        for step in range(2):
            metrics, _ = trainer.step(step)
            assert metrics["engine/logprob_gap_max"] == 0.0


def test_a_run_that_cannot_match_the_trainer_does_not_start(tmp_path, monkeypatch, no_accelerator):
    monkeypatch.setattr("paceline.rl.learner.fused.fused_policy.load_products", lambda: None)
    options = ["rollout.match_trainer=true", *IN_BFLOAT16]
    says = "match_trainer: LlamaForCausalLM .* could not be built: install g"
    with pytest.raises(UserError, match=says), tiny_trainer(tmp_path, monkeypatch, "[0.0]", *options):
        pass


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (Gemma2Config(**SIZES, query_pre_attn_scalar=32), "soft-capped|scaled|norms"),
        (LlamaConfig(**SIZES | {"hidden_size": 48}), "without kernels"),
        (LlamaConfig(**SIZES, hidden_act="gelu"), "without kernels"),
    ],
)
def test_other_policies_run_on_transformers_modules(config, reason):
    with pytest.raises(UnsupportedPolicy, match=reason):
        FusedPolicy(policy_of(config))


def test_a_policy_with_adapters_or_in_pieces_is_not_fused():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert "not whole" in str(PolicyLogProbs(tiny_llama(), fuse=False).fused)
    assert "bfloat16" in str(PolicyLogProbs(tiny_llama()).fused)
    with pytest.raises(UnsupportedPolicy, match="float32"):
        FusedPolicy(tiny_llama().bfloat16())


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("rollout.dtype=float32", "the engine computes in float32"),
        ("policy.mixed_precision=no", "the trainer computes in float32"),
        ("scale.fsdp2=true", "the policy is sharded"),
    ],
)
def test_what_does_not_match_is_said_before_a_run(override, says):
    with pytest.raises(UserError, match=f"match_trainer .* {says}"):
        load_config(ROOT / "configs" / "tiny.yaml", ["rollout.match_trainer=true", *IN_BFLOAT16, override])
