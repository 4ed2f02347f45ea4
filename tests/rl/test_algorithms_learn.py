"""Every recipe's algorithm learns a task that can be learned."""

import math
from datetime import timedelta

import pytest
import yaml

from paceline.rl.monitoring.tracker import Tracker
from paceline.rl.recipe import load_config
from paceline.rl.trainer import Trainer, make_accelerator
from paceline.rollout import RolloutEngine
from tests.support import ROOT

REWARD = """
def digits(prompts, completions, **columns):
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
"""
STEPS = 60


_OTHERS = ["dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp"]


@pytest.mark.parametrize(
    "recipe", ["grpo", "ppo", *(pytest.param(name, marks=pytest.mark.ci) for name in _OTHERS)]
)
def test_it_learns_to_write_digits(recipe, tmp_path, monkeypatch):
    """From a tenth of the characters to nine tenths, with the recipe's own update section on a random
    model."""
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "digit_reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    sections = yaml.safe_load((ROOT / "configs" / f"{recipe}.yaml").read_text())
    named = [
        f"{section}.{key}={value}"
        for section in ("update", "critic")
        for key, value in sections.get(section, {}).items()
    ]
    tiny = [
        "update.minibatches=1",
        "update.kl_coef=0.0",
        "update.lr=3e-3",
        "critic.lr=3e-3",
        "measure.plain_every=0",
    ]
    # a random model hardly ever stops by itself: all would be left out
    named.append("update.mask_truncated=false")
    rollout = [
        "rollout.max_tokens=8",
        "rollout.group_size=8",
        "speculation.drafters=[suffix]",
        "speculation.strategy=plain",
    ]
    overrides = [
        *tiny,
        *named,
        *rollout,
        "task.reward=digit_reward:digits",
        f"out={tmp_path / 'run'}",
        f"steps={STEPS}",
    ]
    config = load_config(ROOT / "configs" / "tiny.yaml", overrides)
    (tmp_path / "run").mkdir()
    with Tracker(config, tmp_path / "run", active=False) as tracker:
        trainer = Trainer(
            config, tmp_path / "run", make_accelerator(config, timedelta(minutes=1)), None, tracker
        )
        rewards = []
        with trainer.scoring:
            for step in range(config.steps):
                metrics, _ = trainer.step(step)
                rewards.append(metrics["reward/mean"])
                if min(rewards[-3:]) >= 0.9 and len(rewards) >= 3:
                    break
    assert rewards[0] < 0.4
    assert min(rewards[-3:]) >= 0.9, rewards
    assert ("critic/explained_variance" in metrics) == (recipe == "ppo")


def test_groups_that_say_nothing_are_asked_again_and_stay_out(tmp_path, monkeypatch):
    """A reward that is the same for most groups: others are asked beside them, with seeds of their own, and
    only those count.
    """
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    reward = (
        "def rare(prompts, completions, **columns):\n    return [float(text.count('7') > 1) for text in "
        "completions]\n"
    )
    (tmp_path / "rare_reward.py").write_text(reward)
    monkeypatch.chdir(tmp_path)
    options = [
        "rollout.resample=2",
        "rollout.group_size=2",
        "task.reward=rare_reward:rare",
        "speculation.drafters=[suffix]",
    ]
    config = load_config(
        ROOT / "configs" / "tiny.yaml",
        [*options, "speculation.strategy=plain", f"out={tmp_path / 'run'}", "steps=2"],
    )
    (tmp_path / "run").mkdir()
    with Tracker(config, tmp_path / "run", active=False) as tracker:
        trainer = Trainer(
            config, tmp_path / "run", make_accelerator(config, timedelta(minutes=1)), None, tracker
        )
        with trainer.scoring:
            metrics, (record,) = trainer.step(0)
    groups = len(record["rewards"]) // 2
    assert groups > 4
    pairs = [record["rewards"][2 * g : 2 * g + 2] for g in range(groups)]
    informative = sum(a != b for a, b in pairs)
    assert metrics["update/tokens"] == sum(
        n for g, (a, b) in enumerate(pairs) if a != b for n in record["lengths"][2 * g : 2 * g + 2]
    )
    assert informative < groups
    assert len([s for s in record["spans"] if s[0] == "rollout"]) > 1


def one_step(tmp_path, monkeypatch, reward: str, *options: str) -> tuple[Trainer, dict, list[bool]]:
    """A step of the tiny recipe: the trainer, the step's metrics, and which of the policy's tensors it
    changed.
    """
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "step_reward.py").write_text(
        f"def score(prompts, completions, **columns):\n    return {reward}\n"
    )
    monkeypatch.chdir(tmp_path)
    plain = [
        "speculation.drafters=[suffix]",
        "speculation.strategy=plain",
        "update.kl_coef=0.0",
        "measure.plain_every=0",
    ]
    arguments = [*plain, *options, "task.reward=step_reward:score", f"out={tmp_path / 'run'}", "steps=2"]
    config = load_config(ROOT / "configs" / "tiny.yaml", arguments)
    (tmp_path / "run").mkdir()
    with Tracker(config, tmp_path / "run", active=False) as tracker:
        trainer = Trainer(
            config, tmp_path / "run", make_accelerator(config, timedelta(minutes=1)), None, tracker
        )
        before = [p.detach().clone() for p in trainer.policy.parameters()]
        with trainer.scoring:
            metrics, _ = trainer.step(0)
    return (
        trainer,
        metrics,
        [not bool((a == b).all()) for a, b in zip(before, trainer.policy.parameters(), strict=True)],
    )


def test_a_batch_that_is_empty_after_filtering_changes_nothing(tmp_path, monkeypatch):
    """Every completion is cut, and cut ones are left out."""
    options = (
        "update.mask_truncated=true",
        "rollout.max_tokens=2",
        "seed=2",
    )  # with others a completion ends in time
    _, metrics, changed = one_step(tmp_path, monkeypatch, "[float(len(c)) for c in completions]", *options)
    assert metrics["length/truncated"] == 16
    assert metrics["update/tokens"] == 0 and metrics["update/loss"] == 0 and metrics["update/skipped"] == 0
    assert not any(changed)


def test_groups_that_are_all_alike_change_nothing(tmp_path, monkeypatch):
    _, metrics, changed = one_step(tmp_path, monkeypatch, "[0.5] * len(completions)")
    assert metrics["reward/uniform_groups"] == 1.0
    assert not any(changed)


def test_an_update_that_is_not_finite_is_left_out_and_counted(tmp_path, monkeypatch):
    """An infinite advantage weight cannot be had from finite rewards; an overflowing learning signal can: an
    entropy bonus of 1e38 makes the gradient infinite."""
    _, metrics, changed = one_step(
        tmp_path, monkeypatch, "[float(len(c)) for c in completions]", "update.entropy_coef=1e38"
    )
    assert metrics["update/skipped"] == 2  # both minibatches
    assert not any(changed)


@pytest.mark.parametrize("importance", ["token", "sequence"])
def test_importance_weights_reach_the_gradient(tmp_path, monkeypatch, importance):
    """Where the engine claims log-probs that are too low by ln 4, every token weighs the cap instead of 1."""
    updates = []
    for case, (level, shift) in enumerate([("none", 0.0), (importance, math.log(4))]):
        folder = tmp_path / str(case)
        folder.mkdir()
        lowered = RolloutEngine.generate

        def generate(self, *arguments, shift=shift, lowered=lowered, **options):
            rollouts = lowered(self, *arguments, **options)
            for r in rollouts:
                r.logprobs = [x - shift for x in r.logprobs]
            return rollouts

        with monkeypatch.context() as patch:
            patch.setattr(RolloutEngine, "generate", generate)
            options = (
                f"update.importance={level}",
                "update.importance_cap=2.0",
                "update.grad_clip=1e9",
                "update.minibatches=1",
            )
            _, metrics, _ = one_step(folder, patch, "[float(len(set(c))) for c in completions]", *options)
        updates.append(metrics)
    assert updates[1]["update/grad_norm"] == pytest.approx(2 * updates[0]["update/grad_norm"], rel=1e-3)
    assert (
        updates[1]["engine/importance_truncated"] == 1.0 and updates[0]["engine/importance_truncated"] == 0.0
    )
    assert updates[0]["engine/effective_share"] == pytest.approx(1.0, abs=1e-3)
