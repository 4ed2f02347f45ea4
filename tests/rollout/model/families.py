"""The tested model families, in tiny random models; ``python -m tests.rollout.model.families`` writes their
table into the docs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.support import ROOT

PAGE = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- families: python -m tests.rollout.model.families -->", "<!-- end of families -->"
COMMON = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": None,
    "bos_token_id": None,
}
_GROUPED = {"num_key_value_heads": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_ALTERNATING = {"sliding_window": 16, "layer_types": ["sliding_attention", "full_attention"] * 2}


@dataclass(frozen=True, slots=True)
class Family:
    """A family and what is claimed of it.

    Attributes:
        kind: transformers' ``model_type``.
        models: Of which the family is.
        options: Of its tiny config, beside `COMMON`.
        fused: How many of the four layers run fused.
        trained: Whether updates on packed sequences are exact; else they are refused.
    """

    kind: str
    models: str
    options: dict[str, Any] = field(default_factory=dict)
    fused: int = 0
    trained: bool = True


FAMILIES = (
    Family("llama", "Llama 2 and 3, SmolLM2, Yi, DeepSeek-R1-Distill-Llama", _GROUPED, fused=4),
    Family("qwen2", "Qwen2, Qwen2.5, DeepSeek-R1-Distill-Qwen", _GROUPED, fused=4),
    Family("qwen3", "Qwen3", {**_GROUPED, "head_dim": 32}, fused=4),
    Family("mistral", "Mistral 7B, Nemo", {**_GROUPED, "sliding_window": 24}, fused=4),
    Family("ministral3", "Ministral 3", {**_GROUPED, "head_dim": 16}, fused=4),
    Family("gemma", "Gemma", {**_GROUPED, "head_dim": 16}, fused=4),
    Family(
        "gemma2",
        "Gemma 2",
        {**_GROUPED, **_ALTERNATING, "head_dim": 16, "query_pre_attn_scalar": 16},
        fused=4,
        trained=False,
    ),
    Family("gemma3_text", "Gemma 3", {**_GROUPED, **_ALTERNATING, "head_dim": 32}, fused=4),
    Family(
        "granite",
        "Granite 3",
        {**_GROUPED, "logits_scaling": 4.0, "embedding_multiplier": 2.0},
        fused=4,
        trained=False,
    ),
    Family("smollm3", "SmolLM3", _GROUPED, fused=4),
    Family("seed_oss", "Seed-OSS", {**_GROUPED, "head_dim": 16}, fused=4),
    Family("gpt2", "GPT-2, DistilGPT-2"),
    Family("opt", "OPT", {"ffn_dim": 128, "word_embed_proj_dim": 64}),
    Family("gpt_neox", "GPT-NeoX, Pythia"),
    Family("gptj", "GPT-J", {"rotary_dim": 8}),
    Family("gpt_bigcode", "StarCoder", {"n_inner": 128}),
    Family("starcoder2", "StarCoder2", _GROUPED),
    Family("phi", "Phi-1, Phi-2"),
    Family("phi3", "Phi-3, Phi-4", {**_GROUPED, "partial_rotary_factor": 0.5}),
    Family("olmo", "OLMo", _GROUPED),
    Family("olmo2", "OLMo 2", _GROUPED),
    Family("olmo3", "OLMo 3", {**_GROUPED, "sliding_window": 16}),
    Family("cohere", "Command R", {**_GROUPED, "logit_scale": 0.25}, trained=False),
    Family(
        "cohere2",
        "Command R7B, A",
        {**_GROUPED, **_ALTERNATING, "logit_scale": 0.25, "head_dim": 16},
        trained=False,
    ),
    Family("glm", "GLM-4 9B", {**_GROUPED, "head_dim": 16}),
    Family("glm4", "GLM-4-0414", {**_GROUPED, "head_dim": 16}),
    Family("exaone4", "EXAONE 4", {**_GROUPED, **_ALTERNATING, "head_dim": 16}),
    Family("ernie4_5", "ERNIE 4.5 0.3B", {**_GROUPED, "head_dim": 16}),
    Family(
        "llama4_text",
        "Llama 4, up to its attention's chunk",
        {**_GROUPED, "head_dim": 16, "num_local_experts": 2},
    ),
    Family("mixtral", "Mixtral", {**_GROUPED, "num_local_experts": 4}),
    Family(
        "qwen2_moe",
        "Qwen1.5-MoE, Qwen2-57B-A14B",
        {**_GROUPED, **_EXPERTS, "shared_expert_intermediate_size": 32},
    ),
    Family("qwen3_moe", "Qwen3 with experts", {**_GROUPED, **_EXPERTS, "head_dim": 16}),
    Family("olmoe", "OLMoE", {**_GROUPED, "num_experts": 4, "num_experts_per_tok": 2}),
    Family("granitemoe", "Granite 3 with experts", {**_GROUPED, "num_local_experts": 4}),
    Family(
        "glm4_moe", "GLM-4.5", {**_GROUPED, "head_dim": 16, "n_routed_experts": 4, "num_experts_per_tok": 2}
    ),
)
BY_KIND = {family.kind: family for family in FAMILIES}
_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 16,
}
REFUSED = (
    (
        Family(
            "deepseek_v3",
            "DeepSeek-V3, R1",
            {**_LATENT, "n_routed_experts": 8, "n_group": 2, "topk_group": 1},
        ),
        "several shapes",
    ),
    (Family("gpt_oss", "gpt-oss", {**_GROUPED, "head_dim": 16, "num_local_experts": 4}), "attention sinks"),
    (Family("doge", "Doge"), "its own mask"),
    (Family("lfm2", "LFM2", {"layer_types": ["conv", "full_attention"] * 2}), "keep a state instead of keys"),
    (Family("mamba", "Mamba"), "does not let its attention be replaced"),
    (Family("jamba", "Jamba"), "does not let its attention be replaced"),
    (Family("bloom", "BLOOM"), "does not let its attention be replaced"),
    (Family("falcon", "Falcon"), "does not let its attention be replaced"),
    (Family("stablelm", "StableLM"), "does not let its attention be replaced"),
)


def tiny(family: Family, **options: Any) -> PreTrainedModel:
    """A random float32 model of a family, with gains and biases other than those of a fresh one, which hide
    mistakes.
    """
    torch.manual_seed(0)
    config = AutoConfig.for_model(family.kind, **{**COMMON, **family.options, **options})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.2)
            elif "lm_head" in name or "embed" in name:
                parameter.mul_(3)
    return model


def table() -> str:
    """The families in Markdown, as they are tested."""
    lines = ["| model_type | models | decoder layers | updates |", "| --- | --- | --- | --- |"]
    for family in FAMILIES:
        layers = "fused" if family.fused else "transformers' own"
        lines.append(
            f"| `{family.kind}` | {family.models} | {layers} | {'yes' if family.trained else 'refused'} |"
        )
    lines += [
        "",
        "Refused in one line, by a run and by `--dry-run`:",
        "",
        "| model_type | models | because it |",
        "| --- | --- | --- |",
    ]
    reasons = {
        "several shapes": "stores latents of several shapes in place of keys and values",
        "attention sinks": "uses attention sinks, which change the softmax",
        "its own mask": "adds its own mask to the attention scores",
        "keep a state instead of keys": "has layers that keep a state instead of keys",
        "does not let its attention be replaced": "does not let its attention be replaced",
    }
    lines += [f"| `{family.kind}` | {family.models} | {reasons[reason]} |" for family, reason in REFUSED]
    return "\n".join(lines)


def page() -> str:
    """The page with the present table."""
    text = PAGE.read_text(encoding="utf-8")
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
