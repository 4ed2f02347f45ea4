"""Rules for the top-level keys and the ``policy``, ``scale`` and ``evaluation`` sections."""

from __future__ import annotations

import math

from paceline.rl.config.run import RunConfig
from paceline.rl.validation.rules import Rule, at_least


def run_rules(config: RunConfig) -> list[Rule]:
    """Returns rules for the run's length, its checkpoints, and the policy's warm-up."""
    warmup = config.policy.warmup
    return [
        *at_least(1, {"steps": config.steps, "save_every": config.save_every, "keep_last": config.keep_last}),
        (
            config.eval_every >= 0,
            f"eval_every is {config.eval_every}: write 0 for no evaluations, or a number of steps",
        ),
        (
            not config.keep_best or config.eval_every > 0,
            "keep_best requires evaluations: write eval_every, for example 10",
        ),
        (
            warmup is None or 0 <= warmup.rechecks < 1,
            f"policy.warmup.rechecks is {getattr(warmup, 'rechecks', 0)}, with which a solution may never "
            "end: write a number in [0, 1)",
        ),
    ]


def scale_rules(config: RunConfig) -> list[Rule]:
    """Returns rules for sharding, adapters and time limits."""
    scale = config.scale
    return [
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
            "scale.lora: write a rank of at least 1 and an alpha above 0",
        ),
    ]


def evaluation_rules(config: RunConfig) -> list[Rule]:
    """Returns rules for evaluations."""
    e = config.evaluation
    return [
        (
            e.split is None or e.path is not None,
            "evaluation.split is a split of the data set in evaluation.path, which is null: write "
            "evaluation.path, or evaluation.split: null",
        ),
        *at_least(1, {"evaluation.prompts": e.prompts, "evaluation.samples": e.samples}),
        (
            e.temperature is None or 0 <= e.temperature < math.inf,
            f"evaluation.temperature is {e.temperature}: write 0 for greedy, or a number above 0",
        ),
    ]
