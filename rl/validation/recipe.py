"""Which values of a recipe contradict each other."""

from __future__ import annotations

import math

from paceline.rl.config.run import RunConfig
from paceline.rl.validation.length import length_rules
from paceline.rl.validation.speculation import check_drafting, refuse
from paceline.rl.validation.task import task_rules


def check(config: RunConfig) -> None:
    """Contradictions between values that are each valid.

    Raises:
        UserError: for the first one found.
    """
    r, u, scale = config.rollout, config.update, config.scale
    rules = [
        (
            r.group_size >= 2,
            "rollout.group_size is 1: group-relative advantages need at least 2 samples of each prompt",
        ),
        (r.resample >= 0, f"rollout.resample is {r.resample}: write a number from 0"),
        (
            r.resample == 0 or u.advantage in ("group", "rloo"),
            "rollout.resample asks again where a group's advantages are zero; update.advantage "
            f"{u.advantage} has no groups",
        ),
        (
            r.segment_tokens is None or r.segment_tokens >= 1,
            f"rollout.segment_tokens is {r.segment_tokens}: write at least 1, or null",
        ),
        (
            r.segment_tokens is None or r.resample == 0,
            "rollout.resample asks again for groups that are over, with rollout.segment_tokens others are "
            "not: choose one",
        ),
        (
            r.segment_tokens is None or config.measure.plain_every == 0,
            "measure.plain_every decodes whole rollouts again, rollout.segment_tokens cuts them: write "
            "measure.plain_every: 0",
        ),
        *tree_rules(config),
        *length_rules(config),
        (config.steps >= 1 and config.save_every >= 1, "steps and save_every must be at least 1"),
        *evaluation_rules(config),
        *range_rules(config),
        (
            not (scale.deepspeed and scale.fsdp2),
            "scale.deepspeed and scale.fsdp2 both shard the policy: choose one",
        ),
        (
            scale.timeout_minutes > 0,
            f"scale.timeout_minutes is {scale.timeout_minutes}: write a number above 0",
        ),
        (
            scale.lora is None or (scale.lora.rank >= 1 and scale.lora.alpha > 0),
            "scale.lora.rank must be at least 1, and alpha above 0",
        ),
        (u.minibatches >= 1, f"update.minibatches is {u.minibatches}: write at least 1"),
        (
            config.policy.warmup is None or 0 <= config.policy.warmup.rechecks < 1,
            "policy.warmup.rechecks must lie in [0, 1): a solution would never end",
        ),
        (u.lr > 0 and config.drafter.lr > 0, "learning rates must be above 0"),
        (config.critic.lr > 0, "learning rates must be above 0"),
        (
            0 < config.critic.gamma <= 1 and 0 <= config.critic.gae_lambda <= 1,
            "critic.gamma must lie in (0, 1] and critic.gae_lambda in [0, 1]",
        ),
        (u.kl_coef >= 0, f"update.kl_coef is {u.kl_coef}: write a number from 0"),
        (
            u.kl_coef == 0 or u.kl_in != "loss" or u.kl != "k1",
            "update.kl k1 has no gradient on average in the loss: write kl: k2 or k3, or kl_in: reward",
        ),
        (
            u.kl_target is None or u.kl_coef > 0,
            "update.kl_target adapts update.kl_coef, which is 0: write where to start",
        ),
        (
            u.kl_target is None or u.kl_target > 0,
            f"update.kl_target is {u.kl_target}: write a number above 0, or null",
        ),
        (
            u.mask_mastered is None or (0 < u.mask_mastered < 1 and u.mastered_below > 0),
            "update.mask_mastered must lie in (0, 1), and update.mastered_below above 0",
        ),
        (u.importance_cap >= 1, f"update.importance_cap is {u.importance_cap}: write at least 1"),
        (
            u.advantage == "group" or u.scale_by_std,
            f"update.scale_by_std is about group advantages, update.advantage is {u.advantage}: leave it out",
        ),
        (
            config.task.score_workers >= 1
            and config.task.score_seconds > 0
            and config.task.score_deadline > 0,
            "task.score_workers must be at least 1, score_seconds and score_deadline above 0",
        ),
        *task_rules(config),
    ]
    refuse(rules)
    check_drafting(config)


def range_rules(config: RunConfig) -> list[tuple[bool, str]]:
    """Rules about numbers that mean nothing below zero or beyond all bounds."""
    above = {
        "rollout.kv_memory_gb": config.rollout.kv_memory_gb,
        "update.grad_clip": config.update.grad_clip,
        "critic.grad_clip": config.critic.grad_clip,
        "critic.value_clip": config.critic.value_clip,
        "update.mastered_below": config.update.mastered_below,
    }
    from_zero = {"update.weight_decay": config.update.weight_decay, "update.clip_low": config.update.clip_low}
    return [
        *(
            (value is None or 0 < value < math.inf, f"{key} is {value}: write a number above 0")
            for key, value in above.items()
        ),
        *(
            (0 <= value < math.inf, f"{key} is {value}: write a number from 0")
            for key, value in from_zero.items()
        ),
    ]


def evaluation_rules(config: RunConfig) -> list[tuple[bool, str]]:
    """Rules about evaluations and the checkpoints that a run keeps."""
    e = config.evaluation
    return [
        (config.eval_every >= 0, f"eval_every is {config.eval_every}: write 0 for no evaluations, or steps"),
        (config.keep_last >= 1, f"keep_last is {config.keep_last}: write at least 1"),
        (
            not config.keep_best or config.eval_every > 0,
            "keep_best needs evaluations: write eval_every, for example 10",
        ),
        (
            e.split is None or e.path is not None,
            "evaluation.split is of a Hugging Face data set: name it in evaluation.path",
        ),
        (e.prompts >= 1 and e.samples >= 1, "evaluation.prompts and evaluation.samples must be at least 1"),
        (
            e.temperature is None or 0 <= e.temperature < float("inf"),
            f"evaluation.temperature is {e.temperature}: write 0 for greedy or a number above 0",
        ),
    ]


def tree_rules(config: RunConfig) -> list[tuple[bool, str]]:
    """Of samples that share beginnings."""
    r, tree = config.rollout, config.rollout.tree
    if tree is None:
        return [
            (
                config.update.advantage != "tree",
                "update.advantage tree is of samples that share beginnings: write rollout.tree",
            )
        ]
    return [
        (
            tree.segment_tokens >= 1 and tree.width >= 2 and 1 <= tree.roots <= r.group_size,
            "rollout.tree: segment_tokens must be at least 1, width at least 2, roots between 1 and "
            "rollout.group_size",
        ),
        (
            r.segment_tokens is None,
            "rollout.segment_tokens carries samples over steps, rollout.tree finishes a group: choose one",
        ),
        (
            config.measure.plain_every == 0,
            "measure.plain_every decodes samples apart: write 0 with rollout.tree",
        ),
        (
            not config.length.budgets or config.length.budget_of == "prompt",
            "rollout.tree shares beginnings of one prompt: write length.budget_of: prompt",
        ),
        (
            config.update.advantage not in ("gae", "reinforce_pp"),
            "rollout.tree makes groups: write update.advantage: tree, group or rloo",
        ),
    ]
