"""Adapters: what is accepted merges exactly, everything else is one line; saved ones are peft's own."""

import dataclasses
import json

import peft
import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from paceline.rl.config.scale import LoraConfig
from paceline.rl.dry_run.description import describe
from paceline.rl.errors import UserError
from paceline.rl.integrations.policy import HostPolicy
from paceline.rl.models.initial import adapter_base
from paceline.rl.models.lora import AdapterBase, add_adapters, merged_weights, save_adapters
from paceline.rl.models.mergeable import adapted_layers, check_adapter_config
from paceline.rl.models.policies import fetch_policy
from paceline.rl.recipe import load_config
from tests.engines import tiny_llama
from tests.support import ROOT, tiny_trainer

IDS = torch.randint(3, 90, (2, 9), generator=torch.Generator().manual_seed(0))
_SMALL = {
    "vocab_size": 97,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
}


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=1
        )
    )


def qwen2():
    return Qwen2ForCausalLM(Qwen2Config(**_SMALL, num_key_value_heads=2))


def mixtral():
    return MixtralForCausalLM(MixtralConfig(**_SMALL, num_key_value_heads=2, num_local_experts=4))


def tied_llama():
    return LlamaForCausalLM(LlamaConfig(**_SMALL, num_key_value_heads=2, tie_word_embeddings=True))


def moved(model, seed=1):
    """Adapters that are not at zero any more."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 8)
    return model.eval()


def made(build):
    torch.manual_seed(0)
    return build().eval()


EXACT = {
    "alpha": {"r": 3, "lora_alpha": 7},
    "rslora": {"r": 4, "lora_alpha": 16, "use_rslora": True},
    "patterns": {"r": 4, "rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 40}},
    "some layers": {"layers_to_transform": [1], "layers_pattern": "layers"},
    "without some": {"exclude_modules": ["v_proj"]},
    "an untied head": {"target_modules": ["q_proj", "lm_head"]},
    "dropout": {"lora_dropout": 0.5},
    **{
        str(first): {"init_lora_weights": first}
        for first in (False, "gaussian", "orthogonal", "pissa", "pissa_niter_4", "olora")
    },
}


@pytest.mark.parametrize("options", EXACT.values(), ids=EXACT)
def test_what_is_accepted_merges_exactly(options):
    """The engine's copy of a host's PEFT model, and the model's own forward."""
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "r": 4, **options}
    model = moved(get_peft_model(tiny_llama(), peft.LoraConfig(task_type="CAUSAL_LM", **options)))
    host = HostPolicy(model, torch.float32, torch.device("cpu"))
    host.refresh()
    with torch.no_grad():
        wanted, base = model(IDS).logits, model.get_base_model()
        torch.testing.assert_close(host.decoded(IDS).logits, wanted, rtol=0, atol=2e-5)
        for layer in adapted_layers(base):
            base.get_submodule(layer).enable_adapters(False)
        assert (model(IDS).logits - wanted).abs().max() > 1e-2


@pytest.mark.parametrize("build", [gpt2, qwen2, mixtral, tied_llama])
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_every_linear_layer_of_other_families_merges_exactly(build):
    """Weights kept as [in, out], biases, experts whose weights stay, a tied head: with the recipe's
    adapters."""
    policy = made(build)
    add_adapters(policy, LoraConfig(rank=2), seed=0)
    moved(policy)
    plain = made(build)
    copied = {
        n: t.clone()
        for n, t in merged_weights(lambda wanted: weights(policy, wanted), adapted_layers(policy))
    }
    assert copied.keys() == dict(plain.named_parameters()).keys()
    with torch.no_grad():
        before = plain(IDS).logits
        plain.load_state_dict(copied, strict=False)
        torch.testing.assert_close(plain(IDS).logits, policy(IDS).logits, rtol=0, atol=2e-5)
        assert (before - plain(IDS).logits).abs().max() > 1e-2


def weights(policy, wanted):
    return ((name, p.detach()) for name, p in policy.named_parameters() if wanted(name))


REFUSED = {
    "use_dora": {"use_dora": True},
    "lora_bias": {"lora_bias": True, "target_modules": ["q_proj"]},
    "bias": {"bias": "all"},
    "modules_to_save": {"modules_to_save": ["lm_head"]},
    "trainable_token_indices": {"trainable_token_indices": [1, 2]},
    "layer_replication": {"layer_replication": [(0, 2), (1, 4)]},
    "target_parameters": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj"]},
    "alora_invocation_tokens": {"alora_invocation_tokens": [1, 2]},
    "init_lora_weights": {"init_lora_weights": "mica"},
    "embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
    "ensure_weight_tying": {"target_modules": ["embed_tokens"], "ensure_weight_tying": True},
    "velora_config": {"velora_config": {}},
}


@pytest.mark.parametrize("key", REFUSED)
@pytest.mark.filterwarnings("ignore")
def test_what_is_not_known_to_merge_is_one_line_that_names_it(key):
    build = {"target_parameters": mixtral, "lora_bias": qwen2, "ensure_weight_tying": tied_llama}.get(
        key, tiny_llama
    )
    options = {"target_modules": ["q_proj", "v_proj"], **REFUSED[key]}
    if key == "velora_config":
        options[key] = peft.tuners.lora.config.VeloraConfig()
    model = get_peft_model(made(build), peft.LoraConfig(task_type="CAUSAL_LM", **options))
    with pytest.raises(UserError, match=key) as found:
        HostPolicy(model, torch.float32, torch.device("cpu"))
    assert "\n" not in str(found.value) and len(str(found.value)) < 300


def test_every_field_of_pefts_config_is_free_or_refused():
    """Also one that a later release brings: whatever is not on the list must have its default."""

    @dataclasses.dataclass
    class Later(peft.LoraConfig):
        use_something_new: bool = False

    with pytest.raises(ValueError, match="peft_type"):
        check_adapter_config(Later())
    config = peft.LoraConfig()
    check_adapter_config(config)
    config.use_bdlora = object()
    with pytest.raises(ValueError, match="use_bdlora"):
        check_adapter_config(config)


@pytest.mark.parametrize(
    "kind", [peft.IA3Config, peft.VeraConfig, peft.PromptTuningConfig, peft.AdaLoraConfig]
)
def test_other_methods_are_one_line(kind):
    options = {"num_virtual_tokens": 4} if kind is peft.PromptTuningConfig else {"target_modules": ["q_proj"]}
    options |= {"feedforward_modules": []} if kind is peft.IA3Config else {}
    options |= {"total_step": 10} if kind is peft.AdaLoraConfig else {}
    model = get_peft_model(tiny_llama(), kind(task_type="CAUSAL_LM", **options))
    with pytest.raises(
        UserError, match=r"peft_type \w+ is not known to merge exactly: train with peft's LoraConfig"
    ):
        HostPolicy(model, torch.float32, torch.device("cpu"))


def test_a_tied_head_is_not_adapted():
    tied = made(tied_llama)
    with pytest.raises(
        UserError, match=r"scale.lora.targets: lm_head: its weight is also that of another layer"
    ):
        add_adapters(tied, LoraConfig(targets=("q_proj", "lm_head")), seed=0)
    with pytest.raises(UserError, match=r"scale.lora.targets: model.embed_tokens: peft's layer.Embedding"):
        add_adapters(made(tied_llama), LoraConfig(targets=("q_proj", "embed_tokens")), seed=0)
    with pytest.raises(
        UserError, match=r"scale.lora.targets: no layer is named 'v_prj'; write some of .*v_proj"
    ):
        add_adapters(made(tied_llama), LoraConfig(targets=("q_proj", "v_prj")), seed=0)


def test_the_adapter_in_use_is_followed():
    """A frozen copy beside it, as TRL keeps one for its KL term; a changed scaling; what is merged already is
    refused.
    """
    model = get_peft_model(
        tiny_llama(), peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM")
    )
    model.add_adapter("ref", peft.LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    moved(model)
    host = HostPolicy(model, torch.float32, torch.device("cpu"))
    for layer in adapted_layers(model.get_base_model()):
        model.get_base_model().get_submodule(layer).scale_layer(3.0)
    host.refresh()
    with torch.no_grad():
        torch.testing.assert_close(host.decoded(IDS).logits, model(IDS).logits, rtol=0, atol=2e-5)
    model.merge_adapter()
    with pytest.raises(UserError, match="merged already"):
        host.refresh()
    model.unmerge_adapter()
    model.set_adapter("ref")
    with pytest.raises(UserError, match=r"set_adapter\('default'\)"):
        host.refresh()


def test_adapters_inside_a_policy_that_nothing_wraps_are_followed():
    model = tiny_llama()
    peft.inject_adapter_in_model(peft.LoraConfig(r=4, target_modules=["q_proj"]), model)
    moved(model)
    host = HostPolicy(model, torch.float32, torch.device("cpu"))
    host.refresh()
    with torch.no_grad():
        torch.testing.assert_close(host.decoded(IDS).logits, model(IDS).logits, rtol=0, atol=2e-5)


def test_a_quantized_policy_is_one_line():
    model = tiny_llama()
    model.hf_quantizer = object()
    with pytest.raises(UserError, match="quantized"):
        HostPolicy(model, torch.float32, torch.device("cpu"))
    eighth = get_peft_model(tiny_llama(), peft.LoraConfig(target_modules=["q_proj"]))
    layer = eighth.get_base_model().model.layers[0].self_attn.q_proj
    layer.base_layer.weight = torch.nn.Parameter(
        layer.base_layer.weight.to(torch.float8_e4m3fn), requires_grad=False
    )
    with pytest.raises(UserError, match="are not quantized"):
        HostPolicy(eighth, torch.float32, torch.device("cpu"))


def test_saved_adapters_lead_peft_to_their_base(tmp_path):
    """`AutoPeftModelForCausalLM` loads the directory alone, and it is the policy that was trained."""
    tiny_llama().save_pretrained(tmp_path / "base")
    policy = tiny_llama()
    add_adapters(policy, LoraConfig(rank=4, alpha=8), seed=3, base=AdapterBase(str(tmp_path / "base")))
    moved(policy)
    save_adapters(
        policy, {n: p.detach() for n, p in policy.named_parameters() if ".lora_" in n}, tmp_path / "adapter"
    )
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IDS).logits, policy(IDS).logits, rtol=0, atol=2e-5)
    assert again.peft_config["default"].task_type == "CAUSAL_LM"


@pytest.mark.parametrize("written", [{"base_model_name_or_path": "org/base"}, [], None])
def test_adapters_without_their_policy_are_one_line(tmp_path, written):
    (tmp_path / "adapter_config.json").write_text("{" if written is None else json.dumps(written))
    base = "org/base" if written else "an unnamed policy"
    with pytest.raises(
        UserError, match=rf"policy.model .*: holds adapters of {base}, not a policy; merge them"
    ) as found:
        fetch_policy(str(tmp_path))
    assert "\n" not in str(found.value)


def test_a_hub_policy_is_named_by_its_id_and_commit(tmp_path):
    snapshot = tmp_path / "models--org--name" / "snapshots" / ("0" * 40)
    assert adapter_base("org/name", snapshot) == AdapterBase("org/name", "0" * 40)
    assert adapter_base("tiny-llama", tmp_path) == AdapterBase(str(tmp_path))


def test_a_runs_policy_is_its_base_and_adapter(tmp_path, monkeypatch):
    """One step of the recipe: what is saved as the policy, and what peft makes of the adapter beside it."""
    reward = "[sum(x.isdigit() for x in c) / max(len(c), 1) for c in completions]"
    options = ["scale.lora={rank: 4, alpha: 64}", "update.lr=0.02", "save_every=1", "steps=1"]
    with tiny_trainer(tmp_path, monkeypatch, reward, *options) as trainer:
        trainer.run()
    saved = tmp_path / "run" / "checkpoint"
    policy = AutoModelForCausalLM.from_pretrained(saved / "policy").eval()
    adapted = AutoPeftModelForCausalLM.from_pretrained(saved / "adapter").eval()
    with torch.no_grad():
        wanted = adapted(IDS).logits
        torch.testing.assert_close(policy(IDS).logits, wanted, rtol=0, atol=1e-4)
        with adapted.disable_adapter():
            assert (adapted(IDS).logits - wanted).abs().max() > 1e-3


def test_a_dry_run_refuses_what_a_run_would(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    recipe = ROOT / "configs" / "tiny.yaml"
    config = load_config(recipe, ["scale.lora={rank: 4, targets: [q_proj, lm_head]}"])
    with pytest.raises(UserError, match=r"scale\.lora\.targets: lm_head"):
        describe(config, recipe, 1)
