"""A new advantage, policy loss or distillation loss is a function and its line in a table."""

import pytest
import torch

from paceline.drafter_trainer.objective.losses import LOSSES, total_variation
from paceline.rl.algorithms.advantages import ADVANTAGES, token_advantages
from paceline.rl.algorithms.grpo import TokenLoss
from paceline.rl.algorithms.policy_losses import POLICY_LOSSES
from paceline.rl.errors import UserError
from paceline.rl.recipe import load_config

TINY = "configs/tiny.yaml"


def without_baseline(batch):
    return batch.per_token(batch.net_rewards)


def reinforce_loss(logprobs, old_logprobs, advantages, *, owner, clip_low, clip_high):
    return TokenLoss(-logprobs * advantages, torch.zeros_like(advantages, dtype=torch.bool))


@pytest.mark.parametrize(
    ("table", "function", "key"),
    [
        (ADVANTAGES, without_baseline, "update.advantage"),
        (POLICY_LOSSES, reinforce_loss, "update.ratio"),
        (LOSSES, total_variation, "drafter.loss"),
    ],
)
def test_a_line_in_the_table_is_a_name_in_recipes(monkeypatch, table, function, key):
    with pytest.raises(UserError, match=rf"{key} is 'mine': write one of {next(iter(table))}, "):
        load_config(TINY, [f"{key}=mine"])
    monkeypatch.setitem(table, "mine", function)
    section, name = key.split(".")
    assert getattr(getattr(load_config(TINY, [f"{key}=mine"]), section), name) == "mine"


def test_a_new_estimator_gets_rewards_and_penalties(monkeypatch):
    monkeypatch.setitem(ADVANTAGES, "mine", without_baseline)
    update = load_config(TINY, ["update.advantage=mine"]).update
    advantages = token_advantages(update, 2, [1.0, 0.5], [torch.zeros(2), torch.ones(1)], lambda part: part)
    assert [a.tolist() for a in advantages] == [[1.0, 1.0], [-0.5]]


def test_a_near_miss_is_proposed():
    with pytest.raises(UserError, match="did you mean rloo"):
        load_config(TINY, ["update.advantage=rlo"])
