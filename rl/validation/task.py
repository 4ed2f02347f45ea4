"""Which values of a recipe's task section contradict each other."""

from __future__ import annotations

import math

from paceline.rl.config.run import RunConfig

# what encoding a prompt decides itself; `tools` and `documents` are the template's own arguments, as
# `enable_thinking` is
_DECIDED = {
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


def task_rules(config: RunConfig) -> list[tuple[bool, str]]:
    """Each rule with what to say where it does not hold."""
    task = config.task
    gym, hub = task.source == "reasoning_gym", task.source == "huggingface"
    decided = sorted(_DECIDED & task.chat_template_kwargs.keys())
    return [
        (
            gym or task.path is not None,
            f"task.source is {task.source}: name {'its directory or id' if hub else 'the file'} in task.path",
        ),
        (
            not gym or task.path is None,
            "task.path is not read by task.source reasoning_gym: write jsonl, parquet or huggingface",
        ),
        (not gym or bool(task.datasets), "task.datasets is empty: name at least one"),
        (
            not gym or task.size >= config.rollout.prompts_per_step,
            "task.size is less than rollout.prompts_per_step: a step would repeat a prompt",
        ),
        (
            config.policy.warmup is None or bool(task.datasets),
            "policy.warmup learns worked solutions of task.datasets, which is empty: name some, or write "
            "policy.warmup: null",
        ),
        (
            hub or (task.subset is None and task.split == "train"),
            "task.split and task.subset are read with task.source huggingface only",
        ),
        (0 <= task.heldout < 1, f"task.heldout is {task.heldout}: write a share from 0 to below 1"),
        (
            math.isfinite(task.score_failed) and (task.score_memory is None or task.score_memory > 0),
            "task.score_failed must be a finite number, task.score_memory above 0, or null",
        ),
        (
            isinstance(task.reward, str | None)
            or (
                bool(task.reward)
                and all(math.isfinite(entry.weight) and entry.reward for entry in task.reward)
            ),
            "task.reward: write {reward: module:function, weight: a finite number} for each, at least one, "
            "or null",
        ),
        (
            task.reward is not None or not task.reward_sees_special_tokens,
            "task.reward_sees_special_tokens is about task.reward, which is null: the problems' own scorers "
            "read plain text",
        ),
        (
            not decided,
            f"task.chat_template_kwargs sets {', '.join(decided)}, which encoding a prompt decides: leave it "
            "out",
        ),
    ]
