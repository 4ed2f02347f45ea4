"""Rules for the ``task`` section."""

from __future__ import annotations

import math

from paceline.rl.config.run import RunConfig
from paceline.rl.validation.rules import Rule, at_least

# Arguments that encoding a prompt sets itself. The template's own, such as `tools`, `documents` and
# `enable_thinking`, are allowed.
_ENCODING_ARGUMENTS = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "tokenize",
    "tokenizer_kwargs",
    "truncation",
}


def task_rules(config: RunConfig) -> list[Rule]:
    """Returns rules for where problems come from, how they are asked, and how completions are scored."""
    return [*_source_rules(config), *_prompt_rules(config), *_scoring_rules(config)]


def _source_rules(config: RunConfig) -> list[Rule]:
    """Returns rules for the origin of the problems."""
    task = config.task
    gym, hub = task.source == "reasoning_gym", task.source == "huggingface"
    return [
        (
            gym or task.path is not None,
            f"task.source is {task.source}: name {'its directory or id' if hub else 'the file'} in task.path",
        ),
        (
            not gym or task.path is None,
            "task.path is not read by task.source reasoning_gym: write task.source: jsonl, parquet or "
            "huggingface",
        ),
        (not gym or bool(task.datasets), "task.datasets is empty: name at least one data set"),
        (
            not gym or task.size >= config.rollout.prompts_per_step,
            f"task.size is {task.size}, less than rollout.prompts_per_step, "
            f"{config.rollout.prompts_per_step}, so that a step would repeat a prompt: write at least as "
            "many",
        ),
        (
            config.policy.warmup is None or bool(task.datasets),
            "policy.warmup learns worked solutions of task.datasets, which is empty: name some, or write "
            "policy.warmup: null",
        ),
        (
            hub or (task.subset is None and task.split == "train"),
            "task.split and task.subset are read with task.source huggingface only: leave them out",
        ),
        (0 <= task.heldout < 1, f"task.heldout is {task.heldout}: write a share in [0, 1)"),
    ]


def _prompt_rules(config: RunConfig) -> list[Rule]:
    """Returns rules for the encoding of prompts."""
    refused = sorted(_ENCODING_ARGUMENTS & config.task.chat_template_kwargs.keys())
    return [
        (
            not refused,
            f"task.chat_template_kwargs sets {', '.join(refused)}, which encoding a prompt decides: leave it "
            "out",
        )
    ]


def _scoring_rules(config: RunConfig) -> list[Rule]:
    """Returns rules for reward functions and the processes that run them."""
    task = config.task
    several = () if task.reward is None or isinstance(task.reward, str) else task.reward
    return [
        (
            several != () or isinstance(task.reward, str | None),
            "task.reward is an empty list: write at least one {reward: module:function, weight: 1.0}, or "
            "null",
        ),
        (
            all(math.isfinite(entry.weight) and entry.reward for entry in several),
            "task.reward: write {reward: module:function, weight: a finite number} for each reward function",
        ),
        (
            task.reward is not None or not task.reward_sees_special_tokens,
            "task.reward_sees_special_tokens is for functions in task.reward, which is null; the problems' "
            "own scorers read plain text: leave it out",
        ),
        (
            math.isfinite(task.score_failed),
            f"task.score_failed is {task.score_failed}: write a finite number",
        ),
        (
            task.score_memory is None or task.score_memory > 0,
            f"task.score_memory is {task.score_memory}: write GB above 0, or null",
        ),
        *at_least(1, {"task.score_workers": task.score_workers}),
        (task.score_seconds > 0, f"task.score_seconds is {task.score_seconds}: write seconds above 0"),
        (task.score_deadline > 0, f"task.score_deadline is {task.score_deadline}: write seconds above 0"),
    ]
