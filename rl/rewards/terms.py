"""The samples that a length-aware reward reads, and the interface that it implements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Samples:
    """Holds S completions of whole groups; the samples of a prompt are adjacent.

    Attributes:
        rewards: float32 [S], the task's rewards, or those that the previous term returned.
        correct: bool [S], whether the task's own reward counts as correct.
        lengths: int64 [S], completion lengths in tokens.
        group_size: Number of samples per prompt.
        longest: Maximum number of tokens in a completion.
        budgets: float32 [S], tokens that each completion was asked to keep to; None if the recipe sets no
            budgets.
        entropies: S tensors, float32 [L_i], the policy's entropy in nats at each sampled token; None if
            entropies were not collected.
        answers: For each completion, the index of the first token after the answer marker, or the
            completion's length if the marker is missing; None if answers were not searched.
        ratios: float32 [G], the fraction of correct samples in each group of the step, over all ranks; None
            if only the groups in this record are considered.
    """

    rewards: torch.Tensor
    correct: torch.Tensor
    lengths: torch.Tensor
    group_size: int
    longest: int
    budgets: torch.Tensor | None = None
    entropies: Sequence[torch.Tensor] | None = None
    answers: Sequence[int] | None = None
    ratios: torch.Tensor | None = None

    def grouped(self, values: torch.Tensor) -> torch.Tensor:
        """Returns values of shape [S] as float32 [S / group_size, group_size]."""
        return values.float().view(-1, self.group_size)

    def correct_ratios(self) -> torch.Tensor:
        """Returns float32 [S], the fraction of correct samples in each completion's group."""
        return self.grouped(self.correct).mean(1).repeat_interleave(self.group_size)

    def required_budgets(self) -> torch.Tensor:
        """Returns the budgets, float32 [S].

        Raises:
            ValueError: If there are none.
        """
        if self.budgets is None:
            raise ValueError(
                "budgets are missing, but this reward compares lengths with them; set length.budgets in a "
                "recipe, or pass a column budget"
            )
        return self.budgets


class Term(Protocol):
    """A length-aware reward: a frozen dataclass whose fields are its parameters in a recipe.

    Terms are applied one after the other.

    Attributes:
        needs_budgets: Whether the term compares lengths with budgets.
        needs_entropies: Whether the term reads the policy's entropies.
        needs_group: Whether the term compares the samples of a prompt.
    """

    needs_budgets: bool
    needs_entropies: bool
    needs_group: bool

    def rewards(self, samples: Samples) -> torch.Tensor:
        """Returns the new rewards, float32 [S]."""
        ...

    def advantages(self, samples: Samples) -> torch.Tensor | None:
        """Returns float32 [S] to add to the advantages, or None to add nothing.

        ``samples.rewards`` holds the rewards that this term returned.
        """
        ...


class RewardTerm:
    """Base class of terms that change rewards only; by default from lengths and correctness alone."""

    __slots__ = ()
    needs_budgets = False
    needs_entropies = False
    needs_group = False

    def advantages(self, samples: Samples) -> torch.Tensor | None:
        """Returns None: these terms add nothing to advantages."""
        return None
