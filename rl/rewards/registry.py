"""Loads length-aware reward terms by name, and offers them to other trainers as reward functions.

To add a term, write a frozen dataclass that implements `paceline.rl.rewards.terms.Term` in a new file of this
package, and add one line to `TERMS`.
"""

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

# A term's name in a recipe → "module of this package:class". Modules are imported only for terms in use.
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
    """Builds a term from its name and parameters, for example ``{name: overlong, cache: 64}``.

    Args:
        entry: The term's ``name``, and its dataclass fields by name.
        where: Recipe key or argument that holds the entry, named in errors.

    Raises:
        UserError: If the name or a parameter is unknown.
    """
    parameters = dict(entry)
    name = parameters.pop("name", None)
    if name not in TERMS:
        close = difflib.get_close_matches(str(name), TERMS, n=1, cutoff=0.0)[0]
        raise UserError(
            f"{where} names {name!r}, an unknown length-aware reward; did you mean {close}? "
            f"Write one of {', '.join(TERMS)}"
        )
    module, _, class_name = TERMS[name].partition(":")
    term_class = getattr(importlib.import_module(f"paceline.rl.rewards.{module}"), class_name)
    term: Term = parse(term_class, parameters, where=where)
    return term


def length_terms(config: LengthConfig) -> list[Term]:
    """Builds the terms that ``length.rewards`` names, in their order.

    Raises:
        UserError: If a name or a parameter is unknown.
    """
    return [load_term(entry, "length.rewards") for entry in config.rewards]


def apply_terms(terms: Sequence[Term], samples: Samples) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Applies terms one after the other.

    Args:
        terms: Length-aware rewards; each sees the rewards that the term before it returned.
        samples: S completions of whole groups.

    Returns:
        The final rewards, float32 [S], and the sum of what the terms add to advantages, float32 [S], or None
        if no term adds anything.
    """
    added: torch.Tensor | None = None
    for term in terms:
        samples = replace(samples, rewards=term.rewards(samples))
        advantages = term.advantages(samples)
        if advantages is not None:
            added = advantages if added is None else added + advantages
    return samples.rewards, added


def sample_reward(
    terms: Sequence[Term],
    reward: float,
    length: int,
    longest: int,
    budget: float | None = None,
    correct_from: float = 1.0,
) -> float:
    """Returns one completion's reward after all terms, for trainers that reward one completion at a time.

    Args:
        terms: Length-aware rewards, in the order in which they are applied.
        reward: The task's reward of the completion.
        length: Number of tokens in the completion.
        longest: Maximum number of tokens in a completion.
        budget: Number of tokens that the completion was asked to keep to; None without a budget.
        correct_from: Smallest reward that counts as correct.

    Raises:
        UserError: If a term compares the samples of a group, or reads entropies.
    """
    for term in terms:
        if term.needs_group or term.needs_entropies:
            reason = "compares the samples of a prompt" if term.needs_group else "reads entropies"
            raise UserError(
                f"length-aware reward {type(term).__name__} {reason}, but this trainer rewards one "
                "completion at a time; choose another reward"
            )
    rewards = torch.tensor([reward], dtype=torch.float32)
    budgets = None if budget is None else torch.tensor([float(budget)])
    return float(
        apply_terms(
            terms, Samples(rewards, rewards >= correct_from, torch.tensor([length]), 1, longest, budgets)
        )[0]
    )


class LengthAware:
    """Wraps a reward function in TRL's signature and makes its rewards length-aware.

    ``GRPOTrainer(reward_funcs=LengthAware(accuracy_reward, [{"name": "overlong", "cache": 512}], 16, 4096),
    ...)``. Columns of the data set or of a rollout function that are named ``budget`` (tokens), ``entropies``
    (nats per token) and ``answers`` (index of the answer's first token) are passed to the terms that read
    them. What a term adds to advantages is ignored, because a reward function cannot return advantages.

    Args:
        reward: Reward function in TRL's signature.
        terms: Terms with their parameters, written as in ``length.rewards`` of a recipe.
        group_size: Number of samples per prompt, which must be adjacent in each call.
        longest: Maximum number of tokens in a completion.
        correct_from: Smallest reward that counts as correct.
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
        self.__name__ = "_".join(str(entry["name"]) for entry in terms)  # TRL names its metrics after it

    def __call__(self, prompts: Sequence[Any], completions: Sequence[Any], **columns: Any) -> list[float]:
        """Returns the length-aware reward of each completion, in TRL's signature.

        Raises:
            ValueError: If the number of completions is not a multiple of ``group_size``.
        """
        rewards = torch.tensor(
            self._reward(prompts=prompts, completions=completions, **columns), dtype=torch.float32
        )
        if len(rewards) % self.group_size:
            raise ValueError(
                f"group_size is {self.group_size}, but {len(rewards)} completions are not a multiple of it; "
                "make per_device_train_batch_size a multiple of group_size"
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
