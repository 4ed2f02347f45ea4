"""Rules for the ``drafter`` section."""

from __future__ import annotations

from paceline.drafter_trainer.objective.losses import LENGTH_LOSS, LOSSES
from paceline.rl.config.drafter import DrafterConfig
from paceline.rl.validation.rules import Rule, at_least, one_of


def drafter_rules(d: DrafterConfig) -> list[Rule]:
    """Returns rules for the drafter's objective, its data and its optimizer."""
    return [*_objective_rules(d), *_training_rules(d)]


def _objective_rules(d: DrafterConfig) -> list[Rule]:
    """Returns rules for the loss and its weights."""
    return [
        *one_of([*LOSSES, LENGTH_LOSS], {"drafter.loss": d.loss}),
        *at_least(1, {"drafter.unroll": d.unroll}),
        (
            d.parallel_positions == 0 or d.parallel_positions >= 2,
            f"drafter.parallel_positions is {d.parallel_positions}: write at least 2, as the first position "
            "is that of every draft, or 0",
        ),
        *at_least(1, {"drafter.mask_top": d.mask_top}, ", or null"),
        (
            d.loss != LENGTH_LOSS or not (d.feedback_only or d.on_policy),
            "drafter.loss: length is a loss of whole drafts, but feedback_only and on_policy weight single "
            "positions: leave them out, or write another drafter.loss",
        ),
        (d.on_policy >= 0, f"drafter.on_policy is {d.on_policy}: write a number of at least 0"),
        (0 <= d.reward_weight <= 1, f"drafter.reward_weight is {d.reward_weight}: write a number in [0, 1]"),
    ]


def _training_rules(d: DrafterConfig) -> list[Rule]:
    """Returns rules for the optimizer, the passes over the data, and the comparison of drafters."""
    return [
        (d.lr > 0, f"drafter.lr is {d.lr}: write a learning rate above 0"),
        (
            len(d.ensemble) > 0 and all(multiple > 0 for multiple in d.ensemble),
            f"drafter.ensemble is {list(d.ensemble)}: write multiples of drafter.lr above 0, or [1.0] for "
            "one drafter",
        ),
        (
            d.warmup_minutes is None or d.warmup_minutes > 0,
            f"drafter.warmup_minutes is {d.warmup_minutes}: write minutes above 0, or null",
        ),
        *at_least(16, {"drafter.tokens_per_microbatch": d.tokens_per_microbatch}),
        *at_least(0, {"drafter.context_tokens": d.context_tokens}),
        (
            d.max_slowdown >= 0,
            f"drafter.max_slowdown is {d.max_slowdown}: write a share of at least 0, such as 0.15",
        ),
        *at_least(
            1,
            {
                "drafter.least_idle_ranks": d.least_idle_ranks,
                "drafter.passes": d.passes,
                "drafter.judge_every": d.judge_every,
            },
        ),
        (
            d.held_out_every != 1,
            "drafter.held_out_every is 1, which holds out every group and leaves none to train on: write "
            "0, or at least 2",
        ),
        (
            0 <= d.previous_share < 1,
            f"drafter.previous_share is {d.previous_share}: write a number in [0, 1)",
        ),
        (0 < d.age_decay <= 1, f"drafter.age_decay is {d.age_decay}: write a number in (0, 1]"),
    ]
