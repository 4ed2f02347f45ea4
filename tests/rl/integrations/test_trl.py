"""Real TRL trainers whose rollouts are ours: tiny models, two or three steps."""

import json
import math
from argparse import Namespace

import pytest
import torch
from datasets import Dataset
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig

from paceline.cli.trial import share_of_digits
from paceline.drafter_trainer.storage.checkpoint import load_drafter
from paceline.rl.errors import UserError
from paceline.rl.integrations.trl import RLOOTrainer, paceline_rollouts
from paceline.rl.integrations.trl_arguments import check_trainer
from paceline.rl.models.policies import fetch_policy
from paceline.rl.rewards.registry import LengthAware
from tests.engines import forward_logprobs

PROMPTS = [{"prompt": f"{i} + 1 ="} for i in range(8)]
DRAFTING = {
    "speculation": {"drafters": ["suffix", "eagle3"]},
    "drafter": {
        "schedule": "always",
        "draft_vocab_size": 48,
        "unroll": 2,
        "tokens_per_microbatch": 128,
        "held_out_every": 2,
    },
}


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    return fetch_policy("tiny-llama")


def common(folder, **options):
    return {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": 8,
        "num_generations": 4,
        "max_completion_length": 12,
        "max_steps": 2,
        "learning_rate": 1e-2,
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "save_strategy": "no",
        "logging_steps": 1,
        **options,
    }


def trainer_for(
    tiny,
    folder,
    rollouts,
    kind=GRPOTrainer,
    config=GRPOConfig,
    reward=share_of_digits,
    peft_config=None,
    **options,
):
    return kind(
        model=str(tiny),
        reward_funcs=reward,
        args=config(**common(folder, **options)),
        train_dataset=Dataset.from_list(PROMPTS),
        processing_class=AutoTokenizer.from_pretrained(tiny),
        peft_config=peft_config,
        rollout_func=rollouts,
    )


class Watched:
    """The rollout function, and what it returned beside what the policy says of that at the moment."""

    def __init__(self, rollouts, temperature):
        self.inner, self.temperature, self.errors, self.calls = rollouts, temperature, [], []

    def __call__(self, prompts, trainer):
        found = self.inner(prompts, trainer)
        model = trainer.accelerator.unwrap_model(trainer.model)
        for prompt, ids, logprobs in zip(
            found["prompt_ids"], found["completion_ids"], found["logprobs"], strict=True
        ):
            wanted = forward_logprobs(model, prompt, ids, self.temperature).tolist()
            self.errors.append(max(abs(a - b) for a, b in zip(logprobs, wanted, strict=True)))
        self.calls.append(found["completion_ids"])
        return found


@pytest.mark.parametrize("adapters", [False, True])
def test_grpo_draws_from_the_present_policy(tiny, tmp_path, adapters):
    """Log-probs are the policy's own after each update, at the trainer's temperature; adapters are merged."""
    from peft import LoraConfig

    watched = Watched(paceline_rollouts(**DRAFTING), 0.7)
    lora = LoraConfig(r=4, lora_alpha=16, use_rslora=True, target_modules="all-linear") if adapters else None
    trainer = trainer_for(tiny, tmp_path, watched, peft_config=lora, temperature=0.7, max_steps=3)
    before = [p.detach().clone() for p in trainer.model.parameters() if p.requires_grad]
    trainer.train()
    assert len(watched.calls) == 3
    assert max(watched.errors) < 1e-3
    moved = [p for p in trainer.model.parameters() if p.requires_grad]
    assert max((a - b).abs().max() for a, b in zip(before, moved, strict=True)) > 1e-3
    logged = [entry for entry in trainer.state.log_history if "paceline/acceptance_length" in entry]
    assert len(logged) == 3
    assert all(entry["paceline/acceptance_length"] >= 1 for entry in logged)
    assert logged[-1]["paceline/drafter_updates"] > 0
    assert all(entry["paceline/drafter_held_back_seconds"] == 0 for entry in logged)
    assert all(not math.isnan(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    drafter = load_drafter(tmp_path / "trl" / "paceline" / "drafter", trainer.model.config.vocab_size, 64)
    assert drafter.config.draft_vocab_size == 48
    card = ModelCard.load(tmp_path / "trl" / "paceline" / "drafter" / "README.md")
    assert "eagle3" in card.data.tags and str(tiny) in card.text and "at temperature 0.7" in card.text


def written_through_data(model):
    for parameter in adapters_of(model):
        parameter.data.normal_(0, 0.1)


def put_in_place_of_data(model):
    for parameter in adapters_of(model):
        parameter.data = torch.randn_like(parameter) * 0.1


def loaded(model):
    model.load_state_dict(
        {name: tensor + 0.1 * torch.randn_like(tensor) for name, tensor in model.state_dict().items()}
    )


def scaled(model):
    for module in model.modules():
        if hasattr(module, "scale_layer"):
            module.scale_layer(3.0)


def adapters_of(model):
    return [p for p in model.parameters() if p.requires_grad]


def test_rollouts_follow_the_weights_whoever_wrote_them(tiny, tmp_path):
    """Also where the trainer's step has not moved: a second train(), a checkpoint that was loaded, writes by
    hand.
    """
    from peft import LoraConfig

    rollouts = paceline_rollouts()
    watched = Watched(rollouts, 1.0)
    lora = LoraConfig(r=4, lora_alpha=16, target_modules="all-linear")
    trainer = trainer_for(
        tiny, tmp_path, watched, peft_config=lora, max_steps=1, per_device_eval_batch_size=4
    )
    few = Dataset.from_list(PROMPTS[:1])
    trainer.train()
    trainer.train()
    trainer.evaluate(few)
    version = rollouts._hosted.engine.policy_version
    trainer.evaluate(few)
    assert rollouts._hosted.engine.policy_version == version  # nothing had changed
    for change in (written_through_data, put_in_place_of_data, loaded):
        change(trainer.model)
        trainer.evaluate(few)
        version += 1
        assert rollouts._hosted.engine.policy_version == version, change
    assert len(watched.errors) == 2 * 8 + 5 * 4
    assert max(watched.errors) < 1e-3


def test_what_adapters_do_is_part_of_the_weights(tiny):
    from peft import LoraConfig, get_peft_model

    from paceline.rl.integrations.policy import HostPolicy

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=2, target_modules="all-linear")
    )
    policy = HostPolicy(model, torch.float32, torch.device("cpu"))
    seen = [policy.fingerprint()]
    assert policy.fingerprint() == seen[0]
    scaled(model)
    seen.append(policy.fingerprint())
    model.base_model.disable_adapter_layers()
    seen.append(policy.fingerprint())
    assert len(set(seen)) == 3


def test_copies_keep_the_precision_of_rotary_frequencies(tiny):
    from peft import LoraConfig, get_peft_model

    from paceline.rl.integrations.policy import HostPolicy

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(tiny), LoraConfig(r=2, target_modules="all-linear")
    )
    policy = HostPolicy(model, torch.bfloat16, torch.device("cpu"))
    policy.refresh()
    ours, theirs = dict(policy.decoded.named_buffers()), dict(model.base_model.model.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert {p.dtype for p in policy.decoded.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("same_trainer", [False, True])
def test_rollouts_follow_another_model(tiny, tmp_path, same_trainer, caplog):
    """Of another trainer, or new modules in the same one's: the drafter goes on there."""
    rollouts = paceline_rollouts(**DRAFTING)
    watched = Watched(rollouts, 1.0)
    first = trainer_for(tiny, tmp_path / "first", watched)
    first.train()
    drafter = rollouts._hosted.drafter.local.spot.serving.fc.weight.clone()
    second = (
        first
        if same_trainer
        else trainer_for(tiny, tmp_path / "second", watched, per_device_eval_batch_size=4)
    )
    second.model.lm_head.weight = torch.nn.Parameter(torch.randn_like(second.model.lm_head.weight))
    second.evaluate(Dataset.from_list(PROMPTS))
    assert max(watched.errors) < 1e-3
    warned = [record.message for record in caplog.records if record.name == "paceline"]
    if same_trainer:
        assert torch.equal(rollouts._hosted.drafter.local.spot.serving.fc.weight, drafter)
        assert len(warned) == 1 and "modules were replaced" in warned[0]
        assert not (tmp_path / "first" / "trl" / "paceline" / "handover").exists()
    else:
        assert rollouts._hosted.drafter.local.spot is None and not warned


def test_sampling_follows_the_trainer(tiny, tmp_path):
    """A temperature that is changed between two evaluations counts."""
    watched = Watched(paceline_rollouts(), 1.0)
    trainer = trainer_for(tiny, tmp_path, watched, per_device_eval_batch_size=4)
    trainer.evaluate(Dataset.from_list(PROMPTS[:1]))
    trainer.temperature = watched.temperature = 0.5
    trainer.max_completion_length = 5
    trainer.evaluate(Dataset.from_list(PROMPTS[:1]))
    assert max(watched.errors) < 1e-3
    assert max(map(len, watched.calls[1])) <= 5 < max(map(len, watched.calls[0]))


@pytest.mark.ci
def test_rollouts_follow_the_trainer_seed_alone(tiny, tmp_path):
    """Whatever drafts, the tokens are the same; another seed draws others."""
    seen = []
    for name, seed, sections in (
        ("a", 3, DRAFTING),
        ("b", 3, {"speculation": {"strategy": "plain"}}),
        ("c", 4, {}),
    ):
        watched = Watched(paceline_rollouts(**sections), 1.0)
        trainer_for(tiny, tmp_path / name, watched, seed=seed, learning_rate=0.0).train()
        seen.append(watched.calls[0])
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]


@pytest.mark.ci
def test_a_checkpoint_keeps_the_drafter(tiny, tmp_path, caplog):
    """A stopped run goes on with its drafter, its bandit and the tokens that it would have drawn."""
    whole = Watched(paceline_rollouts(**DRAFTING), 1.0)
    trainer_for(
        tiny, tmp_path / "whole", whole, max_steps=3, learning_rate=0.0, lr_scheduler_type="constant"
    ).train()
    first = Watched(paceline_rollouts(**DRAFTING), 1.0)
    options = {
        "learning_rate": 0.0,
        "lr_scheduler_type": "constant",
        "save_strategy": "steps",
        "save_steps": 2,
    }
    trainer_for(tiny, tmp_path / "cut", first, max_steps=2, **options).train()
    kept = tmp_path / "cut" / "trl" / "checkpoint-2" / "paceline"
    assert json.loads((kept / "state.json").read_text()) == {"calls": 2}
    rest = Watched(paceline_rollouts(**DRAFTING), 1.0)
    trainer_for(tiny, tmp_path / "cut", rest, max_steps=3, **options).train(resume_from_checkpoint=True)
    assert [*first.calls, *rest.calls] == whole.calls
    assert not [record for record in caplog.records if record.name == "paceline"]
    drafters = [
        load_drafter(path, 99, 64).fc.weight
        for path in (kept / "drafter", tmp_path / "whole" / "trl" / "paceline" / "drafter")
    ]
    assert 0 < (drafters[0] - drafters[1]).abs().max() < 0.1  # the whole run's has gone one step on from it
    for broken in ("[2]", '{"calls": null}', "{}", "{"):
        (kept / "state.json").write_text(broken)
        with pytest.raises(UserError, match=r"state\.json: .*; remove .*/paceline to begin "):
            rest.inner._hosted.load(kept)


def test_evaluation_trains_no_drafter(tiny, tmp_path):
    rollouts = paceline_rollouts(**DRAFTING)
    trainer = trainer_for(tiny, tmp_path, rollouts, per_device_eval_batch_size=4, num_generations_eval=2)
    trainer.evaluate(Dataset.from_list(PROMPTS))
    assert rollouts._hosted.drafter.local.spot is None
    trainer.train()
    assert rollouts._hosted.drafter.local.spot is not None


def test_rloo_trains_on_our_rollouts(tiny, tmp_path):
    """TRL's RLOOTrainer, which has no rollout function of its own, sees our completions in its rewards."""
    rollouts = paceline_rollouts(**DRAFTING)
    drawn, scored = [], []
    inner = rollouts.complete

    def complete(prompt_ids, trainer):
        found = inner(prompt_ids, trainer)
        drawn.append([r.token_ids for r in found])
        return found

    rollouts.complete = complete

    def reward(prompts, completions, completion_ids, **columns):
        scored.append(completion_ids)
        return share_of_digits(prompts, completions)

    trainer = trainer_for(tiny, tmp_path, rollouts, kind=RLOOTrainer, config=RLOOConfig, reward=reward)
    trainer.train()
    assert len(scored) == 2
    assert drawn == scored
    assert any("paceline/acceptance_length" in entry for entry in trainer.state.log_history)
    assert load_drafter(tmp_path / "trl" / "paceline" / "drafter", 99, 64).config.draft_vocab_size == 48


def test_length_aware_rewards_read_what_rollouts_carry(tiny, tmp_path):
    """PEAR gets each token's entropy and where the answer begins, through TRL's extra columns."""
    seen = []

    def always(prompts, completions, **columns):
        seen.append((columns["entropies"], columns["answers"], columns["completion_ids"]))
        return [1.0] * len(completions)

    reward = LengthAware(always, [{"name": "pear", "weight": 0.1}], group_size=4, longest=12)
    trainer_for(tiny, tmp_path, paceline_rollouts(answer="="), reward=reward).train()
    assert len(seen) == 2
    for entropies, answers, ids in seen:
        assert [len(e) for e in entropies] == [len(i) for i in ids]
        assert all(0 <= a <= len(i) for a, i in zip(answers, ids, strict=True))
        assert min(min(e) for e in entropies) > 0


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"update": {}}, "update is not a section"),
        ({"rollout": {"temperature": 0.5}}, "is decided by the trainer"),
        ({"rollout": {"max_contxt": 5}}, "is decided by the trainer"),
        ({"drafter": {"reward_weight": 0.5}}, "reward_weight"),
        ({"speculation": {"drafters": ["sufix"]}}, "suffix"),
        ({"speculation": {"max_nodes": "many"}}, "max_nodes"),
    ],
)
def test_sections_are_checked_where_they_are_written(sections, said):
    with pytest.raises(UserError, match=said) as found:
        paceline_rollouts(**sections)
    assert "\n" not in str(found.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"min_p": 0.1}, "min_p is 0.1: write top_p or top_k"),
        ({"repetition_penalty": 1.1}, "repetition_penalty is 1.1: write 1.0"),
        ({"cache_implementation": "static"}, "cache_implementation is static: leave it out"),
        (
            {"use_transformers_continuous_batching": True},
            "use_transformers_continuous_batching is True: leave it out",
        ),
        ({"use_vllm": True}, "use_vllm is True: write use_vllm=False"),
        (
            {"vllm_importance_sampling_mode": "token_mask"},
            "vllm_importance_sampling_mode is token_mask: leave it out",
        ),
        ({"generation_kwargs": {"num_beams": 4}}, "generation_kwargs.num_beams is 4: leave it out"),
        (
            {"generation_kwargs": {"temperature": 0.3}},
            "generation_kwargs.temperature is 0.3: write it as the argument temperature",
        ),
        ({"generation_kwargs": {"stop_strings": ["x"]}}, "stop_strings.*paceline_rollouts"),
        ({"temperature": 0.0}, "temperature is 0: write a number above 0"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_completion_length": None}, "max_completion_length is None: write"),
        ({"min_p": 0.1, "top_p": 1.5}, "min_p.*; top_p"),
    ],
)
def test_arguments_are_checked_where_they_are_handed_over(tmp_path, options, said):
    with pytest.raises(UserError, match=said) as found:
        paceline_rollouts(GRPOConfig(**common(tmp_path, **options)))
    assert "\n" not in str(found.value)


def test_arguments_that_change_nothing_pass(tmp_path):
    neutral = {"do_sample": True, "num_beams": 1, "repetition_penalty": 1.0, "min_p": None}
    paceline_rollouts(GRPOConfig(**common(tmp_path, generation_kwargs=neutral, min_p=0.0, top_k=0)))
    paceline_rollouts(RLOOConfig(**common(tmp_path)))
    with pytest.raises(UserError, match="args is a dict"):
        paceline_rollouts(common(tmp_path))


def one(prompts, completions, **columns):
    return [1.0] * len(completions)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"rollouts": {"rollout": {"max_context": 100000}}}, "reads 1024 tokens"),
        ({"min_p": 0.1}, "min_p is 0.1"),
        (
            {"reward": LengthAware(one, [{"name": "overlong", "cache": 4}], 8, 12)},
            r"group_size=8.*num_generations=4",
        ),
        (
            {"reward": LengthAware(one, [{"name": "overlong", "cache": 4}], 4, 64)},
            r"longest=64.*max_completion_length=12",
        ),
    ],
)
def test_what_cannot_be_is_said_before_anything_is_drawn(tiny, tmp_path, options, said):
    rollouts = paceline_rollouts(**options.pop("rollouts", {}))
    trainer = trainer_for(tiny, tmp_path, rollouts, **options)
    with pytest.raises(UserError, match=said) as found:
        trainer.train()
    assert "\n" not in str(found.value)


def test_trainers_and_places_that_rollouts_cannot_follow(tiny, tmp_path):
    trainer = trainer_for(tiny, tmp_path, None)
    model = trainer.model
    check_trainer(trainer, model)
    trainer.tools = [print]
    with pytest.raises(UserError, match=r"tools is given: .*docs/multi_turn.md"):
        check_trainer(trainer, model)
    trainer.tools = []
    model.lm_head.to("meta")
    with pytest.raises(UserError, match="offloaded to a disk"):
        check_trainer(trainer, model)
    with pytest.raises(UserError, match="the trainer is a Namespace"):
        check_trainer(Namespace(), model)


def test_adapters_beyond_plain_lora_are_refused(tiny):
    from peft import LoraConfig, get_peft_model

    from paceline.rl.integrations.policy import HostPolicy

    model = AutoModelForCausalLM.from_pretrained(tiny)
    dora = get_peft_model(model, LoraConfig(use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="use_dora"):
        HostPolicy(dora, torch.float32, torch.device("cpu"))
