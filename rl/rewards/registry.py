"""Length-aware rewards by name, and as reward functions for other trainers."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from paceline.rl.config.length import LengthConfig
from paceline.rl.config.parsing import parse
from paceline.rl.errors import UserError
from paceline.rl.rewards.terms import Samples, Term

# name in a recipe: module of this package, and class. Modules are imported when a recipe names their term.
TERMS = {
    "alp": "group:Alp",
    "grpo_lambda": "group:GrpoLambda",
    "hbpo": "length:Hbpo",
    "l1_exact": "length:L1Exact",
    "l1_max": "length:L1Max",
    "linear": "length:Linear",
    "overlong": "length:Overlong",
    "pear": "entropy:Pear",
    "shorter_better": "group:ShorterBetter",
    "target": "length:Target",
}


def load_term(entry: Mapping[str, Any], where: str) -> Term:
    """A term from its name and parameters, ``{name: overlong, cache: 64}``.

    Raises:
        UserError: for an unknown name or parameter.
    """
    parameters = dict(entry)
    name = parameters.pop("name", None)
    if name not in TERMS:
        close = difflib.get_close_matches(str(name), TERMS, n=1, cutoff=0.0)[0]
        raise UserError(f"{where} names {name!r}; did you mean {close}? There are: {', '.join(TERMS)}")
    module, _, class_name = TERMS[name].partition(":")
    term_class = getattr(importlib.import_module(f"paceline.rl.rewards.{module}"), class_name)
    term: Term = parse(term_class, parameters, where=where)
    return term


def length_terms(config: LengthConfig) -> list[Term]:
    """The recipe's length-aware rewards.

    Raises:
        UserError: for an unknown name or parameter.
    """
    return [load_term(entry, "length.rewards") for entry in config.rewards]


def apply_terms(terms: Sequence[Term], samples: Samples) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Rewards after all terms in their order, float32 [S], and what they add to advantages, float32 [S] or
    None.
    """
    added: torch.Tensor | None = None
    for term in terms:
        samples = replace(samples, rewards=term.rewards(samples))
        more = term.advantages(samples)
        if more is not None:
            added = more if added is None else added + more
    return samples.rewards, added


def sample_reward(
    terms: Sequence[Term],
    reward: float,
    length: int,
    longest: int,
    budget: float | None = None,
    correct_from: float = 1.0,
) -> float:
    """One completion's reward after all terms, for trainers that ask for one at a time.

    Args:
        terms: In their order.
        reward: The task's.
        length, longest: Its tokens, and the most that there could be.
        budget: Tokens that it was asked for.
        correct_from: Reward from which on it counts as correct.

    Raises:
        UserError: for terms that compare a group, or read entropies.
    """
    for term in terms:
        if term.needs_group or term.needs_entropies:
            what = "compares the samples of a prompt" if term.needs_group else "reads entropies"
            raise UserError(
                f"length reward {type(term).__name__} {what}: this trainer rewards one completion at a time"
            )
    rewards = torch.tensor([reward], dtype=torch.float32)
    budgets = None if budget is None else torch.tensor([float(budget)])
    return float(
        apply_terms(
            terms, Samples(rewards, rewards >= correct_from, torch.tensor([length]), 1, longest, budgets)
        )[0]
    )


class LengthAware:
    """A reward function in TRL's signature: another one's rewards, made length-aware.

    ``GRPOTrainer(reward_funcs=LengthAware(accuracy_reward, [{"name": "overlong", "cache": 512}], 16, 4096),
    ...)``. Columns of the data set or of a rollout function named ``budget`` (tokens),
    ``entropies`` (nats of each token) and ``answers`` (index of the first token of the answer) are handed on
    to the terms that read them. What a term adds to advantages is left out: a reward function cannot.

    Args:
        reward: In TRL's signature.
        terms: As ``length.rewards`` in a recipe.
        group_size: Samples of a prompt, adjacent in each call.
        longest: Most tokens of a completion.
        correct_from: Reward from which on a completion counts as correct.
    """

    def __init__(
        self,
        reward: Callable[..., Sequence[float]],
        terms: Sequence[Mapping[str, Any]],
        group_size: int,
        longest: int,
        correct_from: float = 1.0,
    ) -> None:
        self._reward, self.group_size, self.longest, self._correct_from = (
            reward,
            group_size,
            longest,
            correct_from,
        )
        self._terms = [load_term(entry, "terms") for entry in terms]
        self.needs_entropies = any(term.needs_entropies for term in self._terms)
        self.__name__ = "_".join(str(entry["name"]) for entry in terms)  # TRL names its metrics so

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        rewards = torch.tensor(
            self._reward(prompts=prompts, completions=completions, **columns), dtype=torch.float32
        )
        if len(rewards) % self.group_size:
            raise ValueError(
                f"{len(rewards)} completions are no groups of {self.group_size}: make "
                "per_device_train_batch_size a multiple of it"
            )
        budgets, entropies = columns.get("budget"), columns.get("entropies")
        samples = Samples(
            rewards,
            rewards >= self._correct_from,
            torch.tensor([len(ids) for ids in columns["completion_ids"]]),
            self.group_size,
            self.longest,
            None if budgets is None else torch.tensor(budgets, dtype=torch.float32),
            None if entropies is None else [torch.tensor(e, dtype=torch.float32) for e in entropies],
            columns.get("answers"),
        )
        return apply_terms(self._terms, samples)[0].tolist()
