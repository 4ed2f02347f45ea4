"""Which values of a recipe's length section contradict each other or the rest."""

from __future__ import annotations

from paceline.rl.config.run import RunConfig
from paceline.rl.rewards.registry import length_terms


def length_rules(config: RunConfig) -> list[tuple[bool, str]]:
    """What must hold, each with the line that is said where it does not.

    Raises:
        UserError: for a term or parameter that there is not.
    """
    length, r, u = config.length, config.rollout, config.update
    guard = length.guard
    terms = length_terms(length)
    names = [str(entry["name"]) for entry in length.rewards]
    asks = [name for name, term in zip(names, terms, strict=True) if term.needs_budgets]
    grouped = [name for name, term in zip(names, terms, strict=True) if term.needs_group]
    return [
        (len(set(names)) == len(names), f"length.rewards names {names}: each at most once"),
        (
            not asks or bool(length.budgets),
            f"length.rewards has {asks[:1]}, which compares lengths with budgets: write length.budgets, for "
            "example [64, 128]",
        ),
        (
            not length.budgets or r.group_size % len(length.budgets) == 0 or length.budget_of == "prompt",
            f"rollout.group_size is {r.group_size}, not a multiple of the {len(length.budgets)} "
            "length.budgets, which share it",
        ),
        (
            all(0 < budget <= r.max_tokens for budget in length.budgets),
            f"length.budgets {list(length.budgets)} must lie between 1 and rollout.max_tokens, "
            f"{r.max_tokens}",
        ),
        (
            not length.budgets or "{budget}" in length.budget_prompt,
            "length.budget_prompt does not say {budget}: the policy would not know it",
        ),
        (
            "hbpo" not in names or (u.advantage == "group" and length.budget_of == "subgroup"),
            "length.rewards hbpo compares subgroups of a group: write update.advantage: group and "
            "length.budget_of: subgroup",
        ),
        (
            not grouped or (u.advantage != "reinforce_pp" and u.advantage != "gae"),
            f"length.rewards {grouped[:1]} compares the samples of a prompt: write update.advantage: group "
            "or rloo",
        ),
        (
            names[1:].count("hbpo") == 0,
            "length.rewards hbpo makes rewards of its own and must come first",
        ),
        *_anytime_rules(config),
        (0 < length.quantile < 1, f"length.quantile is {length.quantile}: write a number in (0, 1)"),
        (
            guard.window >= 1 and 0 < guard.accuracy_fall <= 1 and guard.entropy_floor >= 0,
            "length.guard: window must be at least 1, accuracy_fall in (0, 1], entropy_floor at least 0",
        ),
    ]


def _anytime_rules(config: RunConfig) -> list[tuple[bool, str]]:
    anytime, r, u = config.length.anytime, config.rollout, config.update
    if anytime is None:
        return [
            (
                u.advantage != "brpo",
                "update.advantage brpo credits thoughts by demanded answers: write length.anytime",
            )
        ]
    budgets = list(anytime.budgets)
    return [
        (
            u.advantage == "brpo",
            "length.anytime demands answers that only update.advantage: brpo is trained on: write that",
        ),
        (
            bool(budgets)
            and budgets == sorted(set(budgets))
            and budgets[0] > 0
            and budgets[-1] < r.max_tokens,
            f"length.anytime.budgets {budgets} must ascend from 1 and stay below rollout.max_tokens, "
            f"{r.max_tokens}",
        ),
        (
            not anytime.weights or (len(anytime.weights) == len(budgets) + 1 and min(anytime.weights) > 0),
            f"length.anytime.weights must be {len(budgets) + 1} numbers above 0: of each budget and of whole "
            "completions",
        ),
        (
            anytime.answers >= 2 and anytime.answer_tokens >= 1,
            "length.anytime.answers must be at least 2, which are compared with each other, and "
            "answer_tokens at least 1",
        ),
        (
            not config.length.rewards,
            "length.anytime makes rewards dense, length.rewards shapes those at the end: choose one",
        ),
        (
            r.tree is None and r.segment_tokens is None and r.resample == 0,
            "length.anytime cuts a step's own whole completions: leave out rollout.tree, segment_tokens and "
            "resample",
        ),
        (u.kl_coef == 0, "length.anytime has no reference for demanded answers: write update.kl_coef: 0"),
    ]
