"""Rules for the ``length`` section."""

from __future__ import annotations

from paceline.rl.config.run import RunConfig
from paceline.rl.rewards.registry import length_terms
from paceline.rl.validation.rules import Rule


def length_rules(config: RunConfig) -> list[Rule]:
    """Returns rules for length-aware rewards, budgets, prediction and the collapse guard.

    Raises:
        UserError: ``length.rewards`` has a term or parameter that does not exist.
    """
    length, guard = config.length, config.length.guard
    return [
        *_reward_rules(config),
        *_budget_rules(config),
        *_anytime_rules(config),
        (0 < length.quantile < 1, f"length.quantile is {length.quantile}: write a number in (0, 1)"),
        (
            guard.window >= 1 and 0 < guard.accuracy_fall <= 1 and guard.entropy_floor >= 0,
            "length.guard: write window of at least 1, accuracy_fall in (0, 1], entropy_floor of at least 0",
        ),
    ]


def _reward_rules(config: RunConfig) -> list[Rule]:
    """Returns rules for ``length.rewards`` and what its terms need."""
    length, advantage = config.length, config.update.advantage
    names = [str(entry["name"]) for entry in length.rewards]
    terms = dict(zip(names, length_terms(length), strict=False))
    with_budgets = [name for name, term in terms.items() if term.needs_budgets]
    with_group = [name for name, term in terms.items() if term.needs_group]
    return [
        (len(terms) == len(names), f"length.rewards names {names}: write each term at most once"),
        (
            not with_budgets or bool(length.budgets),
            f"length.rewards has {', '.join(with_budgets)}, which compares lengths with budgets: write "
            "length.budgets, for example [64, 128]",
        ),
        (
            "hbpo" not in names or (advantage == "group" and length.budget_of == "subgroup"),
            "length.rewards has hbpo, which compares the subgroups of a group: write update.advantage: group "
            "and length.budget_of: subgroup",
        ),
        (
            not with_group or advantage not in ("reinforce_pp", "gae"),
            f"length.rewards has {', '.join(with_group)}, which compares the samples of a prompt, but "
            f"update.advantage is {advantage}: write update.advantage: group or rloo",
        ),
        (
            "hbpo" not in names[1:],
            "length.rewards has hbpo, which replaces the rewards before it: write it first",
        ),
    ]


def _budget_rules(config: RunConfig) -> list[Rule]:
    """Returns rules for the lengths that prompts ask for."""
    length, r = config.length, config.rollout
    return [
        (
            not length.budgets or r.group_size % len(length.budgets) == 0 or length.budget_of == "prompt",
            f"rollout.group_size is {r.group_size}, but length.budget_of: subgroup divides it among "
            f"{len(length.budgets)} length.budgets: write a multiple of {len(length.budgets)}",
        ),
        (
            all(0 < budget <= r.max_tokens for budget in length.budgets),
            f"length.budgets is {list(length.budgets)}: write numbers from 1 to rollout.max_tokens, "
            f"{r.max_tokens}",
        ),
        (
            not length.budgets or "{budget}" in length.budget_prompt,
            "length.budget_prompt lacks {budget}, so that prompts would not name the budget: write it there",
        ),
    ]


def _anytime_rules(config: RunConfig) -> list[Rule]:
    """Returns rules for answers to truncated thoughts."""
    if config.length.anytime is None:
        return [
            (
                config.update.advantage != "brpo",
                "update.advantage: brpo requires answers to truncated thoughts: write length.anytime",
            )
        ]
    return [*_anytime_values(config), *_anytime_combinations(config)]


def _anytime_values(config: RunConfig) -> list[Rule]:
    """Returns rules for the values of ``length.anytime``."""
    anytime, longest = config.length.anytime, config.rollout.max_tokens
    assert anytime is not None
    budgets = list(anytime.budgets)
    ascending = bool(budgets) and budgets == sorted(set(budgets))
    return [
        (
            ascending and budgets[0] > 0 and budgets[-1] < longest,
            f"length.anytime.budgets is {budgets}: write ascending numbers from 1 to below "
            f"rollout.max_tokens, {longest}",
        ),
        (
            not anytime.weights or (len(anytime.weights) == len(budgets) + 1 and min(anytime.weights) > 0),
            f"length.anytime.weights is {list(anytime.weights)}: write {len(budgets) + 1} numbers above 0, "
            "one for each budget and one for the whole completion, or []",
        ),
        (
            anytime.answers >= 2 and anytime.answer_tokens >= 1,
            "length.anytime: write answers of at least 2, because they are compared with each other, and "
            "answer_tokens of at least 1",
        ),
    ]


def _anytime_combinations(config: RunConfig) -> list[Rule]:
    """Returns rules against what ``length.anytime`` cannot be combined with."""
    r, u = config.rollout, config.update
    return [
        (
            u.advantage == "brpo",
            f"length.anytime requires update.advantage: brpo, which is {u.advantage}: write brpo, or "
            "length.anytime: null",
        ),
        (
            not config.length.rewards,
            "length.anytime and length.rewards cannot be combined, because terms shape only the rewards of "
            "whole completions: choose one",
        ),
        (
            r.tree is None and r.segment_tokens is None and r.resample == 0,
            "length.anytime needs a step's own, independent and whole completions: leave out rollout.tree, "
            "rollout.segment_tokens and rollout.resample",
        ),
        (
            u.kl_coef == 0,
            "length.anytime does not support a KL penalty, because answers to truncated thoughts have no "
            "reference log-probs: write update.kl_coef: 0",
        ),
    ]
