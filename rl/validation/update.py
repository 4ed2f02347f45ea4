"""Rules for the ``update`` and ``critic`` sections."""

from __future__ import annotations

from paceline.rl.algorithms.advantages import ADVANTAGES
from paceline.rl.algorithms.policy_losses import POLICY_LOSSES
from paceline.rl.config.run import RunConfig
from paceline.rl.validation.rules import Rule, above_zero, at_least, from_zero, one_of


def update_rules(config: RunConfig) -> list[Rule]:
    """Returns rules for the optimizer, the loss and the KL penalty."""
    u = config.update
    return [
        *one_of(ADVANTAGES, {"update.advantage": u.advantage}),
        *one_of(POLICY_LOSSES, {"update.ratio": u.ratio}),
        (u.lr > 0, f"update.lr is {u.lr}: write a learning rate above 0"),
        *above_zero({"update.grad_clip": u.grad_clip, "update.mastered_below": u.mastered_below}),
        *from_zero({"update.weight_decay": u.weight_decay, "update.clip_low": u.clip_low}),
        *at_least(1, {"update.minibatches": u.minibatches}),
        (
            u.mask_mastered is None or 0 < u.mask_mastered < 1,
            f"update.mask_mastered is {u.mask_mastered}: write a probability in (0, 1), or null",
        ),
        (u.importance_cap >= 1, f"update.importance_cap is {u.importance_cap}: write at least 1"),
        (
            u.advantage == "group" or u.scale_by_std,
            f"update.scale_by_std: false is for update.advantage: group, which is {u.advantage}: leave "
            "scale_by_std out",
        ),
        *_kl_rules(config),
    ]


def _kl_rules(config: RunConfig) -> list[Rule]:
    """Returns rules for the KL penalty to the initial policy."""
    u = config.update
    return [
        (u.kl_coef >= 0, f"update.kl_coef is {u.kl_coef}: write a number of at least 0"),
        (
            u.kl_coef == 0 or u.kl_in != "loss" or u.kl != "k1",
            "update.kl k1 has no gradient on average in the loss: write update.kl: k2 or k3, or "
            "update.kl_in: reward",
        ),
        (
            u.kl_target is None or u.kl_coef > 0,
            "update.kl_target adapts update.kl_coef, which is 0: write an initial update.kl_coef above 0",
        ),
        (
            u.kl_target is None or u.kl_target > 0,
            f"update.kl_target is {u.kl_target}: write a number above 0, or null",
        ),
    ]


def critic_rules(config: RunConfig) -> list[Rule]:
    """Returns rules for PPO's critic."""
    c = config.critic
    return [
        (c.lr > 0, f"critic.lr is {c.lr}: write a learning rate above 0"),
        *above_zero({"critic.grad_clip": c.grad_clip, "critic.value_clip": c.value_clip}),
        (0 < c.gamma <= 1, f"critic.gamma is {c.gamma}: write a number in (0, 1]"),
        (0 <= c.gae_lambda <= 1, f"critic.gae_lambda is {c.gae_lambda}: write a number in [0, 1]"),
    ]
