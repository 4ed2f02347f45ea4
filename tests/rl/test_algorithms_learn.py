"""Every recipe's algorithm learns a task that can be learned."""

from datetime import timedelta
from pathlib import Path

import pytest
import yaml

from rl.config import load_config
from rl.tracking import Tracker
from rl.trainer import Trainer, make_accelerator

ROOT = Path(__file__).parents[2]
REWARD = """
def digits(prompts, completions, **columns):
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
"""
STEPS = 60


@pytest.mark.parametrize("recipe", ["grpo", "dr_grpo", "dapo", "gspo", "rloo", "reinforce_pp", "ppo"])
def test_it_learns_to_write_digits(recipe, tmp_path, monkeypatch):
    """From a tenth of the characters to nine tenths, with the recipe's own update section on a random model."""
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "digit_reward.py").write_text(REWARD)
    monkeypatch.chdir(tmp_path)
    sections = yaml.safe_load((ROOT / "configs" / f"{recipe}.yaml").read_text())
    named = [f"{section}.{key}={value}" for section in ("update", "critic") for key, value in sections.get(section, {}).items()]
    tiny = ["update.minibatches=1", "update.kl_coef=0.0", "update.lr=3e-3", "critic.lr=3e-3", "measure.plain_every=0"]
    named.append("update.mask_truncated=false")  # a random model hardly ever stops by itself: all would be left out
    rollout = ["rollout.max_tokens=8", "rollout.group_size=8", "speculation.drafters=[suffix]", "speculation.strategy=plain"]
    overrides = [*tiny, *named, *rollout, "task.reward=digit_reward:digits", f"out={tmp_path / 'run'}", f"steps={STEPS}"]
    config = load_config(ROOT / "configs" / "tiny.yaml", overrides)
    (tmp_path / "run").mkdir()
    with Tracker(config, tmp_path / "run", active=False) as tracker:
        trainer = Trainer(config, tmp_path / "run", make_accelerator(config, timedelta(minutes=1)), None, tracker)
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
    """A reward that is the same for most groups: others are asked beside them, with seeds of their own, and only those count."""
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path / "cache"))
    reward = "def rare(prompts, completions, **columns):\n    return [float(text.count('7') > 1) for text in completions]\n"
    (tmp_path / "rare_reward.py").write_text(reward)
    monkeypatch.chdir(tmp_path)
    options = ["rollout.resample=2", "rollout.group_size=2", "task.reward=rare_reward:rare", "speculation.drafters=[suffix]"]
    config = load_config(
        ROOT / "configs" / "tiny.yaml", [*options, "speculation.strategy=plain", f"out={tmp_path / 'run'}", "steps=2"]
    )
    (tmp_path / "run").mkdir()
    with Tracker(config, tmp_path / "run", active=False) as tracker:
        trainer = Trainer(config, tmp_path / "run", make_accelerator(config, timedelta(minutes=1)), None, tracker)
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
