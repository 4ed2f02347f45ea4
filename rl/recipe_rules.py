"""Which values of a recipe contradict each other."""

from __future__ import annotations

import difflib

from rl.drafting_sections import SpeculationConfig
from rl.errors import UserError
from rl.length_rules import length_rules
from rl.sections import RunConfig
from rollout import Strategy
from rollout.drafters import DRAFTERS, DraftRules
from rollout.trees import MOST_NODES


def check(config: RunConfig) -> None:
    """Contradictions between values that are each valid.

    Raises:
        UserError: for the first one found.
    """
    r, u, d, s, scale = config.rollout, config.update, config.drafter, config.speculation, config.scale
    rules = [
        (r.group_size >= 2, "rollout.group_size is 1: group-relative advantages need at least 2 samples of each prompt"),
        (r.max_tokens >= 1, f"rollout.max_tokens is {r.max_tokens}: write at least 1"),
        (r.max_tokens < r.max_context, "rollout.max_context must exceed rollout.max_tokens: the prompt needs room too"),
        (r.resample >= 0, f"rollout.resample is {r.resample}: write a number from 0"),
        (
            r.resample == 0 or u.advantage in ("group", "rloo"),
            f"rollout.resample asks again where a group's advantages are zero; update.advantage {u.advantage} has no groups",
        ),
        (
            r.segment_tokens is None or r.segment_tokens >= 1,
            f"rollout.segment_tokens is {r.segment_tokens}: write at least 1, or null",
        ),
        (
            r.segment_tokens is None or r.resample == 0,
            "rollout.resample asks again for groups that are over, with rollout.segment_tokens others are not: choose one",
        ),
        (
            r.segment_tokens is None or config.measure.plain_every == 0,
            "measure.plain_every decodes whole rollouts again, rollout.segment_tokens cuts them: write measure.plain_every: 0",
        ),
        *tree_rules(config),
        (0 < r.temperature < float("inf"), f"rollout.temperature is {r.temperature}: RL samples; write a number above 0"),
        (0 < r.top_p <= 1, f"rollout.top_p is {r.top_p}: write a number in (0, 1]"),
        (1 <= s.max_nodes <= MOST_NODES, f"speculation.max_nodes is {s.max_nodes}: write 1 to {MOST_NODES}"),
        (0 <= s.epsilon < 1, f"speculation.epsilon is {s.epsilon}: write a number in [0, 1)"),
        (
            s.eagle3_window is None or s.eagle3_window >= 1,
            f"speculation.eagle3_window is {s.eagle3_window}: write at least 1, or null",
        ),
        (
            "draft_model" not in s.drafters or s.draft_model is not None,
            "speculation.drafters has draft_model: name the model in speculation.draft_model",
        ),
        (
            "composite" not in s.drafters or {"suffix", "eagle3"} <= set(s.drafters),
            "speculation.drafters has composite, which joins suffix and eagle3: list those too",
        ),
        (
            s.verifier is None or s.draw != "likeliest",
            f"speculation.verifier is {s.verifier}, but likeliest drafts need none: write null, or another speculation.draw",
        ),
        (
            s.verifier != "spectr" or s.draw == "replacement",
            "speculation.verifier spectr wants siblings drawn independently: write speculation.draw: replacement",
        ),
        (
            s.verifier not in ("chain", "block") or _only_chains(s),
            f"speculation.verifier {s.verifier} reads chains: name only such in speculation.strategy or arms, and no stand drafter",
        ),
        (
            s.draw == "likeliest" or "composite" not in s.drafters,
            "speculation.drafters has composite, which joins drafts of likeliest tokens: leave it out, or write draw: likeliest",
        ),
        *length_rules(config),
        (config.steps >= 1 and config.save_every >= 1, "steps and save_every must be at least 1"),
        (not (scale.deepspeed and scale.fsdp2), "scale.deepspeed and scale.fsdp2 both shard the policy: choose one"),
        (scale.timeout_minutes > 0, f"scale.timeout_minutes is {scale.timeout_minutes}: write a number above 0"),
        (
            scale.lora is None or (scale.lora.rank >= 1 and scale.lora.alpha > 0),
            "scale.lora.rank must be at least 1, and alpha above 0",
        ),
        (u.minibatches >= 1, f"update.minibatches is {u.minibatches}: write at least 1"),
        (
            config.policy.warmup is None or 0 <= config.policy.warmup.rechecks < 1,
            "policy.warmup.rechecks must lie in [0, 1): a solution would never end",
        ),
        (u.lr > 0 and d.lr > 0, "learning rates must be above 0"),
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
        (u.kl_target is None or u.kl_coef > 0, "update.kl_target adapts update.kl_coef, which is 0: write where to start"),
        (u.kl_target is None or u.kl_target > 0, f"update.kl_target is {u.kl_target}: write a number above 0, or null"),
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
            len(d.ensemble) > 0 and all(multiple > 0 for multiple in d.ensemble),
            f"drafter.ensemble is {list(d.ensemble)}: write multiples of drafter.lr above 0, [1.0] for one drafter",
        ),
        (d.unroll >= 1, f"drafter.unroll is {d.unroll}: write at least 1"),
        (d.mask_top is None or d.mask_top >= 1, f"drafter.mask_top is {d.mask_top}: write at least 1, or null"),
        (
            d.loss != "length" or not (d.feedback_only or d.on_policy),
            "drafter.loss length is of whole drafts: drafter.feedback_only and on_policy weigh single positions; leave them out",
        ),
        (d.on_policy >= 0, f"drafter.on_policy is {d.on_policy}: write a number from 0"),
        (d.least_idle_ranks >= 1, f"drafter.least_idle_ranks is {d.least_idle_ranks}: write at least 1"),
        (
            d.tokens_per_microbatch >= 16 and d.passes >= 1 and d.judge_every >= 1,
            "drafter.tokens_per_microbatch must be at least 16, passes and judge_every at least 1",
        ),
        (d.held_out_every != 1, "drafter.held_out_every is 1: nothing would be left to train on; write 0, or at least 2"),
        (0 <= d.previous_share < 1, f"drafter.previous_share is {d.previous_share}: write a number in [0, 1)"),
        (0 < d.age_decay <= 1, f"drafter.age_decay is {d.age_decay}: write a number in (0, 1]"),
        (0 <= d.reward_weight <= 1, f"drafter.reward_weight is {d.reward_weight}: write a number in [0, 1]"),
        (
            config.task.score_workers >= 1 and config.task.score_seconds > 0 and config.task.score_deadline > 0,
            "task.score_workers must be at least 1, score_seconds and score_deadline above 0",
        ),
        (config.task.source != "jsonl" or config.task.path is not None, "task.source is jsonl: name the file in task.path"),
        (config.task.source != "reasoning_gym" or bool(config.task.datasets), "task.datasets is empty: name at least one"),
        (
            config.task.size >= r.prompts_per_step,
            "task.size is less than rollout.prompts_per_step: a step would repeat a prompt",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise UserError(message)
    for name in s.drafters:
        if name not in DRAFTERS:
            close = difflib.get_close_matches(name, DRAFTERS, n=1, cutoff=0.0)[0]
            raise UserError(f"speculation.drafters has {name!r}; did you mean {close}?")
    try:
        draft_rules(s)
        for text in s.arms if s.strategy in ("adaptive", "plain") else (*s.arms, s.strategy):
            Strategy.parse(text)
    except ValueError as error:
        raise UserError(f"speculation: {error}") from None


def tree_rules(config: RunConfig) -> list[tuple[bool, str]]:
    """Of samples that share beginnings."""
    r, tree = config.rollout, config.rollout.tree
    if tree is None:
        return [
            (config.update.advantage != "tree", "update.advantage tree is of samples that share beginnings: write rollout.tree")
        ]
    return [
        (
            tree.segment_tokens >= 1 and tree.width >= 2 and 1 <= tree.roots <= r.group_size,
            "rollout.tree: segment_tokens must be at least 1, width at least 2, roots between 1 and rollout.group_size",
        ),
        (r.segment_tokens is None, "rollout.segment_tokens carries samples over steps, rollout.tree finishes a group: choose one"),
        (config.measure.plain_every == 0, "measure.plain_every decodes samples apart: write 0 with rollout.tree"),
        (
            not config.length.budgets or config.length.budget_of == "prompt",
            "rollout.tree shares beginnings of one prompt: write length.budget_of: prompt",
        ),
        (
            config.update.advantage not in ("gae", "reinforce_pp"),
            "rollout.tree makes groups: write update.advantage: tree, group or rloo",
        ),
    ]


def _only_chains(s: SpeculationConfig) -> bool:
    named = s.arms if s.strategy == "adaptive" else (s.strategy,)
    return bool(named) and not any("x" in text for text in named) and "stand" not in s.drafters


def draft_rules(s: SpeculationConfig) -> DraftRules:
    """How model-based drafters make their drafts.

    Raises:
        ValueError: for choices that do not fit each other.
    """
    return DraftRules(s.tree, s.draw, s.stop, s.stop_threshold, s.tree_gain)
