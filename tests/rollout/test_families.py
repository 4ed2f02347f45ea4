"""Float32 rollouts of every common family are those of transformers' generate, with fused layers where they apply."""

import shutil

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
)

from rollout import PLAIN, Request, RolloutEngine, SamplingParams, Strategy
from rollout.drafters import SuffixDrafter
from rollout.native import load_kernels

COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
FAMILIES = {
    "llama": {},
    "qwen2": {},
    "qwen3": {"head_dim": 32},
    "mistral": {"sliding_window": 24},
    "gemma3_text": {"head_dim": 32, "sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2},
}
UNKNOWN = {
    "olmo2": {},
    "qwen3_moe": {"head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    "gemma2": {"head_dim": 16, "sliding_window": 16, "query_pre_attn_scalar": 16},
    "phi3": {"partial_rotary_factor": 0.5},
}


def tiny(family: str, options: dict) -> torch.nn.Module:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **{**COMMON, **options}), dtype=torch.float32).eval()
    with torch.no_grad():  # gains and biases other than those of a fresh model, which hide mistakes
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "lm_head" in name or "embed" in name:
                parameter.mul_(3)
    return model


def requests() -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    made = []
    for i, length in enumerate((1, 5, 19, 40, 33, 12)):
        prompt = torch.randint(1, 97, (length,), generator=generator).tolist()
        made.append(Request(prompt, SamplingParams(temperature=0, max_tokens=20 + 7 * i), group=i % 2))
    return made


def reference(model: torch.nn.Module, request: Request) -> list[int]:
    prompt = torch.tensor([list(request.prompt_ids)])
    mask = torch.ones_like(prompt)
    out = model.generate(
        prompt, attention_mask=mask, max_new_tokens=request.params.max_tokens, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return out[0, prompt.shape[1] :].tolist()


@pytest.mark.parametrize("strategy", [PLAIN, Strategy("suffix", 3)], ids=str)
@pytest.mark.parametrize(
    ("family", "options"), [*FAMILIES.items(), *UNKNOWN.items()], ids=lambda x: x if isinstance(x, str) else ""
)
def test_greedy_equals_generate(family, options, strategy):
    model = tiny(family, options)
    engine = RolloutEngine(model, dtype=torch.float32, max_slots=3, max_context=160)
    engine.add_drafter(SuffixDrafter())
    engine.use_strategy(strategy)
    fused = len(engine.runner.view.fused)
    assert fused == (4 if family in FAMILIES else fused), "a common family fell back to unfused layers"
    if family in ("olmo2", "qwen3_moe", "phi3"):
        assert fused == 0
    wanted = [reference(model, r) for r in requests()]
    assert [r.token_ids for r in engine.generate(requests())] == wanted


@pytest.mark.parametrize("family", FAMILIES)
def test_without_native_kernels_the_tokens_are_the_same(family, monkeypatch):
    """A machine without a compiler runs torch's operators."""
    import rollout.layer_probe as layer_probe

    model = tiny(family, FAMILIES[family])
    with_kernels = RolloutEngine(model, dtype=torch.float32, max_slots=3, max_context=160).generate(requests())
    monkeypatch.setattr(layer_probe, "load_kernels", lambda device, dtype: None)
    engine = RolloutEngine(model, dtype=torch.float32, max_slots=3, max_context=160)
    assert len(engine.runner.view.fused) == 4
    assert [r.token_ids for r in engine.generate(requests())] == [r.token_ids for r in with_kernels]


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_log_probs_stay_near_the_trainers(family):
    """The engine's bfloat16 log-probs differ from the float32 forward by rounding only."""
    model = tiny(family, FAMILIES[family])
    engine = RolloutEngine(model, dtype=torch.bfloat16, max_slots=4, max_context=64)
    for rollout in engine.generate([Request([1, 2, i], SamplingParams(max_tokens=20), seed=i) for i in range(4)]):
        ids = torch.tensor([[*rollout.request.prompt_ids, *rollout.token_ids]])
        with torch.no_grad():
            full = torch.log_softmax(model(ids).logits[0, 2:-1], -1).gather(-1, ids[0, 3:, None])[:, 0]
        assert (torch.tensor(rollout.logprobs) - full).abs().mean() < 0.1


def test_a_model_whose_attention_cannot_be_replaced_is_refused():
    with pytest.raises(ValueError, match="does not let its attention be replaced"):
        RolloutEngine(tiny("stablelm", {}), dtype=torch.float32, max_slots=2, max_context=64)


@pytest.mark.skipif(not any(shutil.which(c) for c in ("g++", "clang++", "c++")), reason="no C++ compiler")
def test_kernels_are_built_here():
    """Else the tests above would compare torch's operators with themselves."""
    assert load_kernels("cpu", torch.float32) is not None
