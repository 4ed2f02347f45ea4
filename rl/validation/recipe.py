"""Checks of a whole recipe."""

from __future__ import annotations

from paceline.rl.config.run import RunConfig
from paceline.rl.validation.drafter import drafter_rules
from paceline.rl.validation.length import length_rules
from paceline.rl.validation.rollout import group_rules, match_rules, sampling_rules, tree_rules, vllm_rules
from paceline.rl.validation.rules import require
from paceline.rl.validation.run import evaluation_rules, run_rules, scale_rules
from paceline.rl.validation.speculation import check_strategies, speculation_rules
from paceline.rl.validation.task import task_rules
from paceline.rl.validation.update import critic_rules, update_rules


def check(config: RunConfig) -> None:
    """Checks that a recipe's values make sense, alone and together.

    Raises:
        UserError: The first rule that does not hold, in one line.
    """
    require(
        [
            *group_rules(config),
            *match_rules(config),
            *tree_rules(config),
            *length_rules(config),
            *run_rules(config),
            *evaluation_rules(config),
            *scale_rules(config),
            *update_rules(config),
            *critic_rules(config),
            *task_rules(config),
        ]
    )
    check_decoding(config)


def check_decoding(config: RunConfig) -> None:
    """Checks what concerns decoding, also where another trainer makes the policy update.

    Covers sampling, speculation, the drafter, and rollouts by vLLM.

    Raises:
        UserError: The first rule that does not hold, in one line.
    """
    require(
        [
            *sampling_rules(config),
            *speculation_rules(config.speculation),
            *drafter_rules(config.drafter),
            (
                "parallel" not in config.speculation.drafters or config.drafter.parallel_positions > 0,
                "speculation.drafters has parallel, which the drafter has to learn: write "
                "drafter.parallel_positions, for example 5",
            ),
            *vllm_rules(config),
        ]
    )
    check_strategies(config.speculation)
