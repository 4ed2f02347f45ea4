"""Float32 rollouts of every common family are those of transformers' generate, with fused layers where they
apply.
"""

import shutil
from dataclasses import replace

import pytest
import torch

from paceline.rl.errors import UserError
from paceline.rl.learner.log_probs import PolicyLogProbs
from paceline.rl.learner.packing import PromptRow, Sample, pack
from paceline.rollout import PLAIN, FinishReason, Request, RolloutEngine, SamplingParams, Strategy
from paceline.rollout.drafters import SuffixDrafter
from paceline.rollout.native import load_kernels
from tests.rollout.model.families import BY_KIND, FAMILIES, PAGE, REFUSED, page, tiny

COMMON = [BY_KIND[kind] for kind in ("llama", "qwen2", "qwen3", "mistral", "gemma3_text")]
MORE = [BY_KIND[kind] for kind in ("gpt2", "opt", "olmo2", "qwen3_moe", "gemma2", "phi3", "llama4_text")]
REST = [family for family in FAMILIES if family not in COMMON + MORE]


def kind(family) -> str:
    return family.kind


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
        prompt,
        attention_mask=mask,
        max_new_tokens=request.params.max_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, prompt.shape[1] :].tolist()


def check_greedy(family, strategies, wanted: list[Request]) -> None:
    model = tiny(family)
    expected = [reference(model, r) for r in wanted]
    engine = RolloutEngine(model, dtype=torch.float32, max_slots=3, max_context=160)
    engine.add_drafter(SuffixDrafter())
    assert len(engine.runner.view.fused) == family.fused
    assert engine.fusion.startswith(f"{family.fused} of 4 decoder layers fused")
    for strategy in strategies:
        engine.use_strategy(strategy)
        assert [r.token_ids for r in engine.generate(wanted)] == expected


@pytest.mark.parametrize("strategy", [PLAIN, Strategy("suffix", 3)], ids=str)
@pytest.mark.parametrize("family", COMMON, ids=kind)
def test_greedy_equals_generate(family, strategy):
    check_greedy(family, [strategy], requests())


@pytest.mark.parametrize(
    "family", [*MORE, *(pytest.param(family, marks=pytest.mark.slow) for family in REST)], ids=kind
)
def test_greedy_equals_generate_in_other_families(family):
    few = [
        replace(r, params=SamplingParams(temperature=0, max_tokens=8 + i))
        for i, r in enumerate(requests()[1:5])
    ]
    check_greedy(family, [PLAIN, Strategy("suffix", 3)], few)


def check_packing(family) -> None:
    """In training mode, where dropout of GPT-2 and OPT would show."""
    generator = torch.Generator().manual_seed(0)

    def tokens(n: int) -> list[int]:
        return torch.randint(1, 97, (n,), generator=generator).tolist()

    rows = [
        PromptRow(tokens(5), (Sample(0, tokens(12)), Sample(1, tokens(3)))),
        PromptRow(tokens(30), (Sample(2, tokens(25)),)),
    ]
    model, expected = tiny(family), []
    with torch.no_grad():
        for row in rows:
            for sample in row.samples:
                full = (
                    model(torch.tensor([[*row.prompt, *sample.tokens]]))
                    .logits[0, len(row.prompt) - 1 : -1]
                    .log_softmax(-1)
                )
                expected.append(full.gather(-1, torch.tensor(sample.tokens)[:, None])[:, 0])
        if not family.trained:
            with pytest.raises(UserError, match="caps or scales its logits"):
                PolicyLogProbs(model)
            return
        logprobs, _ = PolicyLogProbs(model).train()(pack(rows), 1.0)
    RolloutEngine(
        model, dtype=torch.float32, max_slots=2, max_context=64
    )  # on the trainer's module, whose attention is another now
    torch.testing.assert_close(logprobs, torch.cat(expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "family", [*COMMON, *MORE, *(pytest.param(family, marks=pytest.mark.ci) for family in REST)], ids=kind
)
def test_packed_log_probs_are_those_of_each_sequence_alone(family):
    check_packing(family)


@pytest.mark.parametrize(("family", "reason"), REFUSED, ids=[family.kind for family, _ in REFUSED])
def test_a_family_that_cannot_run_is_refused_by_rollouts_and_updates_in_a_line(family, reason):
    model = tiny(family)
    with pytest.raises(ValueError, match=reason) as caught:
        RolloutEngine(model, dtype=torch.float32, max_slots=2, max_context=64)
    assert "\n" not in str(caught.value)
    if family.kind != "deepseek_v3":  # whose updates would be exact
        with pytest.raises(UserError, match=reason):
            PolicyLogProbs(model)


def test_the_page_of_families_says_what_is_tested():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m tests.rollout.model.families"


LONGROPE = {
    "rope_theta": 10000.0,
    "rope_type": "longrope",
    "short_factor": [1.0] * 8,
    "long_factor": [4.0 + i for i in range(8)],
    "original_max_position_embeddings": 32,
}
LIMITED = [
    ("llama", {"rope_parameters": LONGROPE}, "longrope"),
    (
        "llama",
        {
            "rope_parameters": {"rope_theta": 1e4, "rope_type": "dynamic", "factor": 8.0},
            "max_position_embeddings": 32,
        },
        "dynamic",
    ),
    ("llama4_text", {"attention_chunk_size": 32}, "chunks"),
    ("llama4_text", {"floor_scale": 33}, "scales its queries"),
    ("gpt2", {"max_position_embeddings": 32}, "no learned positions"),
    ("opt", {"max_position_embeddings": 32}, "no learned positions"),
]


@pytest.mark.parametrize(("kind", "options", "reason"), LIMITED, ids=[reason for _, _, reason in LIMITED])
def test_a_text_is_computed_as_alone_up_to_the_length_that_the_model_sets(kind, options, reason):
    """Up to it exactly, drafts past its end and a longer neighbour included, which fails alone."""
    model = tiny(BY_KIND[kind], **options)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                parameter.mul_(8)
    with pytest.warns(RuntimeWarning, match=rf"{reason}.* past 32 tokens: texts end there"):
        engine = RolloutEngine(model, dtype=torch.float32, max_slots=3, max_context=96)
    engine.add_drafter(SuffixDrafter())
    engine.use_strategy(Strategy("suffix", 8))
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(1, 97, (n,), generator=generator).tolist() for n in (8, 60)]
    repeating = [5, 6] * 8
    sampled = SamplingParams(max_tokens=50)
    short, long, drafted = engine.generate(
        [
            Request(prompts[0], sampled, seed=1),
            Request(prompts[1], sampled, seed=2),
            Request(repeating, sampled, seed=3),
        ]
    )
    assert long.finish_reason is FinishReason.FAILED and "60 tokens, the context 32" in str(long.error)
    for rollout in (short, drafted):
        prompt = list(rollout.request.prompt_ids)
        assert rollout.finish_reason is FinishReason.LENGTH and len(prompt) + len(rollout.token_ids) == 32
        with torch.no_grad():
            full = (
                model(torch.tensor([prompt + rollout.token_ids]))
                .logits[0, len(prompt) - 1 : -1]
                .log_softmax(-1)
            )
        alone = full.gather(-1, torch.tensor(rollout.token_ids)[:, None])[:, 0]
        torch.testing.assert_close(torch.tensor(rollout.logprobs), alone, rtol=0, atol=1e-4)
    packed = (
        pack([PromptRow(prompts[0], (Sample(0, [1] * 24),))]),
        pack([PromptRow(prompts[1], (Sample(0, [1]),))]),
    )
    trained = PolicyLogProbs(model)
    with torch.no_grad():
        trained(packed[0], 1.0)
        with pytest.raises(UserError, match="past 32 tokens"):
            trained(packed[1], 1.0)


@pytest.mark.parametrize("family", COMMON, ids=kind)
def test_without_native_kernels_the_tokens_are_the_same(family, monkeypatch):
    """A machine without a compiler runs torch's operators."""
    from paceline.rollout.model import fusion_check

    model = tiny(family)
    with_kernels = RolloutEngine(model, dtype=torch.float32, max_slots=3, max_context=160).generate(
        requests()
    )
    monkeypatch.setattr(fusion_check, "load_kernels", lambda device, dtype: None)
    engine = RolloutEngine(model, dtype=torch.float32, max_slots=3, max_context=160)
    assert len(engine.runner.view.fused) == 4
    assert [r.token_ids for r in engine.generate(requests())] == [r.token_ids for r in with_kernels]


@pytest.mark.parametrize("family", COMMON, ids=kind)
def test_bfloat16_log_probs_stay_near_the_trainers(family):
    """The engine's bfloat16 log-probs differ from the float32 forward by rounding only."""
    model = tiny(family)
    engine = RolloutEngine(model, dtype=torch.bfloat16, max_slots=4, max_context=64)
    for rollout in engine.generate(
        [Request([1, 2, i], SamplingParams(max_tokens=20), seed=i) for i in range(4)]
    ):
        ids = torch.tensor([[*rollout.request.prompt_ids, *rollout.token_ids]])
        with torch.no_grad():
            full = torch.log_softmax(model(ids).logits[0, 2:-1], -1).gather(-1, ids[0, 3:, None])[:, 0]
        assert (torch.tensor(rollout.logprobs) - full).abs().mean() < 0.1


@pytest.mark.skipif(not any(shutil.which(c) for c in ("g++", "clang++", "c++")), reason="no C++ compiler")
def test_kernels_are_built_here():
    """Else the tests above would compare torch's operators with themselves."""
    assert load_kernels("cpu", torch.float32) is not None
