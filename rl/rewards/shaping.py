"""Makes a step's rewards length-aware: collects what the recipe's terms read, and applies them."""

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
    """Holds the learning signal of one rank's S completions.

    Attributes:
        rewards: Reward of each completion.
        added: float32 [S], added to the advantages; None to add nothing.
        tokens: S tensors, float32 [L_i], token-level advantages where they do not follow from the rewards;
            None otherwise.
        more: Further samples to train on, with their advantages.
    """

    rewards: list[float]
    added: torch.Tensor | None = None
    tokens: list[torch.Tensor] | None = None
    more: tuple[TrainingSample, ...] = ()


class Shaping:
    """Applies the terms of ``length.rewards`` to the rewards of a step.

    Args:
        config: The recipe.
        tokenizer: The policy's tokenizer.
    """

    def __init__(self, config: RunConfig, tokenizer: Any) -> None:
        self._config, self._tokenizer = config, tokenizer
        self._terms = length_terms(config.length)

    def shape(
        self, rollouts: Sequence[Rollout], budgets: Sequence[int] | None, rewards: Sequence[float]
    ) -> Shaped:
        """Returns this rank's rewards after all length-aware terms. Collective if the recipe has terms.

        Args:
            rollouts: Completions of whole groups, the samples of a prompt adjacent; may be empty.
            budgets: Tokens that each completion was asked to keep to, or None.
            rewards: The task's reward of each completion.
        """
        if not self._terms:
            return Shaped(list(rewards))
        length, size = self._config.length, self._config.rollout.group_size
        task_rewards = torch.tensor(rewards, dtype=torch.float32)
        correct = task_rewards >= length.correct_from
        rank_ratios = correct.view(-1, size).float().mean(1).tolist() if len(task_rewards) else []
        # all ranks take part, also those without rollouts; GRPO-λ ranks the groups of the whole step
        ratios = [ratio for gathered in gather_object([rank_ratios]) for ratio in gathered]
        if not rollouts:
            return Shaped([])
        entropies = answers = None
        if any(term.needs_entropies for term in self._terms):
            entropies = [torch.tensor(r.entropies or [0.0] * len(r.token_ids)) for r in rollouts]
            answers = [answer_start(r.token_ids, length.answer, self._tokenizer) for r in rollouts]
        samples = Samples(
            task_rewards,
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
