"""Length-aware rewards of a step: what the recipe's terms are told, and what they make of it."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object

from paceline.rl.config.length import LengthConfig
from paceline.rl.config.run import RunConfig
from paceline.rl.rewards.registry import apply_terms, load_term
from paceline.rl.rewards.terms import Samples, Term
from paceline.rl.types import TrainingSample
from paceline.rollout import Rollout


@dataclass(frozen=True, slots=True)
class Shaped:
    """What a rank's completions are trained on.

    Attributes:
        rewards: Of each completion.
        added: float32 [S], to add to each one's advantages, or None.
        tokens: float32 [L_i], the advantages of each one's tokens, where they do not come from its reward.
        more: Other samples to train on, with their advantages.
    """

    rewards: list[float]
    added: torch.Tensor | None = None
    tokens: list[torch.Tensor] | None = None
    more: tuple[TrainingSample, ...] = ()


def assign_budgets(config: LengthConfig, group_size: int, seed: str) -> list[int] | None:
    """The budget of each sample of a prompt; None where none are asked for.

    Args:
        config: The recipe's length section.
        group_size: Samples of a prompt; for subgroups a multiple of the number of budgets.
        seed: Of the choice, where a prompt draws one.
    """
    if not config.budgets:
        return None
    if config.budget_of == "prompt":
        return [random.Random(seed).choice(config.budgets)] * group_size
    return [config.budgets[i * len(config.budgets) // group_size] for i in range(group_size)]


def length_terms(config: LengthConfig) -> list[Term]:
    """The recipe's length-aware rewards.

    Raises:
        UserError: for an unknown name or parameter.
    """
    return [load_term(entry, "length.rewards") for entry in config.rewards]


def answer_start(token_ids: Sequence[int], marker: str, tokenizer: Any) -> int:
    """Index of the first token after the marker's first appearance; the number of tokens where it does not
    appear.

    Each prefix is decoded as a whole, and only a few: an answer's start is found by bisection.
    """

    def holds(count: int) -> bool:
        return marker in tokenizer.decode(token_ids[:count], skip_special_tokens=True)

    low, high = 0, len(token_ids)
    if not holds(high):
        return high
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high


class Shaping:
    """Applies ``length.rewards``.

    Args:
        config: The recipe.
        tokenizer: The policy's.
    """

    def __init__(self, config: RunConfig, tokenizer: Any) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._terms = length_terms(config.length)

    def shape(
        self, rollouts: Sequence[Rollout], budgets: Sequence[int] | None, rewards: Sequence[float]
    ) -> Shaped:
        """This rank's rewards, made length-aware. Collective where the recipe has terms.

        Args:
            rollouts: Of whole groups, adjacent; may be none.
            budgets: Tokens that each was asked for, or None.
            rewards: Of the task.
        """
        if not self._terms:
            return Shaped(list(rewards))
        length, size = self._config.length, self._config.rollout.group_size
        base = torch.tensor(rewards, dtype=torch.float32)
        correct = base >= length.correct_from
        own = correct.view(-1, size).float().mean(1).tolist() if len(base) else []
        ratios = [ratio for of_rank in gather_object([own]) for ratio in of_rank]
        if not rollouts:
            return Shaped([])
        entropies = answers = None
        if any(term.needs_entropies for term in self._terms):
            entropies = [torch.tensor(r.entropies or [0.0] * len(r.token_ids)) for r in rollouts]
            answers = [answer_start(r.token_ids, length.answer, self._tokenizer) for r in rollouts]
        samples = Samples(
            base,
            correct,
            torch.tensor([len(r.token_ids) for r in rollouts]),
            size,
            self._config.rollout.max_tokens,
            None if budgets is None else torch.tensor(budgets, dtype=torch.float32),
            entropies,
            answers,
            torch.tensor(ratios),
        )
        shaped, added = apply_terms(self._terms, samples)
        return Shaped(shaped.tolist(), added)
