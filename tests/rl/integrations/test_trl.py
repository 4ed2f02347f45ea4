"""Real TRL trainers whose rollouts are ours: tiny models, two or three steps."""

import json
import math

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig

from drafter_trainer.checkpoint import load_drafter
from rl.commands.trial import share_of_digits
from rl.errors import UserError
from rl.integrations.trl import RLOOTrainer, paceline_rollouts
from rl.policies import fetch_policy
from rl.rewards.registry import LengthAware
from tests.support import forward_logprobs

PROMPTS = [{"prompt": f"{i} + 1 ="} for i in range(8)]
DRAFTING = {
    "speculation": {"drafters": ["suffix", "eagle3"]},
    "drafter": {"schedule": "always", "draft_vocab_size": 48, "unroll": 2, "tokens_per_microbatch": 128, "held_out_every": 2},
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


def trainer_for(tiny, folder, rollouts, kind=GRPOTrainer, config=GRPOConfig, reward=share_of_digits, peft_config=None, **options):
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
        for prompt, ids, logprobs in zip(found["prompt_ids"], found["completion_ids"], found["logprobs"], strict=True):
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
    assert all(not math.isnan(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry)
    drafter = load_drafter(tmp_path / "trl" / "paceline" / "drafter", trainer.model.config.vocab_size, 64)
    assert drafter.config.draft_vocab_size == 48


@pytest.mark.ci
def test_rollouts_follow_the_trainer_seed_alone(tiny, tmp_path):
    """Whatever drafts, the tokens are the same; another seed draws others."""
    seen = []
    for name, seed, sections in (("a", 3, DRAFTING), ("b", 3, {"speculation": {"strategy": "plain"}}), ("c", 4, {})):
        watched = Watched(paceline_rollouts(**sections), 1.0)
        trainer_for(tiny, tmp_path / name, watched, seed=seed, learning_rate=0.0).train()
        seen.append(watched.calls[0])
    assert seen[0] == seen[1]
    assert seen[0] != seen[2]


@pytest.mark.ci
def test_a_checkpoint_keeps_the_drafter(tiny, tmp_path, caplog):
    """A stopped run goes on with its drafter, its bandit and the tokens that it would have drawn."""
    whole = Watched(paceline_rollouts(**DRAFTING), 1.0)
    trainer_for(tiny, tmp_path / "whole", whole, max_steps=3, learning_rate=0.0, lr_scheduler_type="constant").train()
    first = Watched(paceline_rollouts(**DRAFTING), 1.0)
    options = {"learning_rate": 0.0, "lr_scheduler_type": "constant", "save_strategy": "steps", "save_steps": 2}
    trainer_for(tiny, tmp_path / "cut", first, max_steps=2, **options).train()
    kept = tmp_path / "cut" / "trl" / "checkpoint-2" / "paceline"
    assert json.loads((kept / "state.json").read_text()) == {"calls": 2}
    rest = Watched(paceline_rollouts(**DRAFTING), 1.0)
    trainer_for(tiny, tmp_path / "cut", rest, max_steps=3, **options).train(resume_from_checkpoint=True)
    assert [*first.calls, *rest.calls] == whole.calls
    assert not [record for record in caplog.records if record.name == "paceline"]
    drafters = [
        load_drafter(path, 99, 64).fc.weight for path in (kept / "drafter", tmp_path / "whole" / "trl" / "paceline" / "drafter")
    ]
    assert 0 < (drafters[0] - drafters[1]).abs().max() < 0.1  # the whole run's has gone one step on from it


def test_evaluation_trains_no_drafter(tiny, tmp_path):
    rollouts = paceline_rollouts(**DRAFTING)
    trainer = trainer_for(tiny, tmp_path, rollouts, per_device_eval_batch_size=4, num_generations_eval=2)
    trainer.evaluate(Dataset.from_list(PROMPTS))
    assert rollouts._hosted.worker.spot is None
    trainer.train()
    assert rollouts._hosted.worker.spot is not None


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
    ("sections", "options", "said"),
    [
        ({"update": {}}, {}, "update is not a section"),
        ({"rollout": {"temperature": 0.5}}, {}, "the trainer's to decide"),
        ({"rollout": {"max_contxt": 5}}, {}, "the trainer's to decide"),
        ({"drafter": {"reward_weight": 0.5}}, {}, "reward_weight"),
        ({"speculation": {"drafters": ["sufix"]}}, {}, "suffix"),
        ({"rollout": {"max_context": 100000}}, {}, "reads 1024 tokens"),
        ({}, {"min_p": 0.1}, "min_p"),
        ({}, {"repetition_penalty": 1.1}, "repetition_penalty"),
    ],
)
def test_what_cannot_be_is_said_in_a_line(tiny, tmp_path, sections, options, said):
    trainer = trainer_for(tiny, tmp_path, paceline_rollouts(**sections), **options)
    with pytest.raises(UserError, match=said) as found:
        trainer.train()
    assert "\n" not in str(found.value)


def test_adapters_beyond_plain_lora_are_refused(tiny):
    from peft import LoraConfig, get_peft_model

    from rl.integrations.policy import HostPolicy

    model = AutoModelForCausalLM.from_pretrained(tiny)
    dora = get_peft_model(model, LoraConfig(use_dora=True, target_modules=["q_proj"]))
    with pytest.raises(UserError, match="use_dora"):
        HostPolicy(dora, torch.float32, torch.device("cpu"))
