"""Length-aware rewards of a step: what the recipe's terms are told, and what they make of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import gather_object

from paceline.rl.config.run import RunConfig
from paceline.rl.rewards.registry import apply_terms, length_terms
from paceline.rl.rewards.terms import Samples
from paceline.rl.tasks.answers import answer_start
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
