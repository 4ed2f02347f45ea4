"""What a length-aware reward sees, and what it may do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


@dataclass(frozen=True, slots=True)
class Samples:
    """Completions of whole groups, the samples of a prompt adjacent; S of them.

    Attributes:
        rewards: float32 [S], so far: of the task, or of the terms before.
        correct: bool [S], by the task's own reward.
        lengths: int64 [S], tokens.
        group_size: Samples of a prompt.
        longest: Most tokens of a completion.
        budgets: float32 [S], tokens that each was asked for; None where the recipe asks for none.
        entropies: float32 [L_i] each, the policy's entropy where each token was drawn, in nats; None where it
            was not collected.
        answers: Of each, the index of the first token after the answer's marker; its length where there is
            none. None where it was not looked for.
        ratios: float32 [G], correct share of each group of the step, over all ranks; None takes these groups
            alone.
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
        """[S] → float32 [groups, group_size]."""
        return values.float().view(-1, self.group_size)

    def correct_ratios(self) -> torch.Tensor:
        """float32 [S], the correct share of each one's group."""
        return self.grouped(self.correct).mean(1).repeat_interleave(self.group_size)

    def asked(self) -> torch.Tensor:
        """The budgets.

        Raises:
            ValueError: where there are none.
        """
        if self.budgets is None:
            raise ValueError("this reward compares lengths with budgets: write length.budgets")
        return self.budgets


class Term(Protocol):
    """A length-aware reward: a frozen dataclass of its parameters. Terms are applied one after the other.

    A term that compares with budgets has ``needs_budgets``, one that reads entropies ``needs_entropies``, one
    that compares the samples of a prompt ``needs_group``.
    """

    needs_budgets: bool
    needs_entropies: bool
    needs_group: bool

    def rewards(self, samples: Samples) -> torch.Tensor:
        """float32 [S]."""
        ...

    def advantages(self, samples: Samples) -> torch.Tensor | None:
        """float32 [S] to add to the advantages, from the rewards that this term made; None for nothing."""
        ...


class RewardTerm:
    """A term that shapes rewards alone, from lengths and correctness."""

    __slots__ = ()
    needs_budgets = False
    needs_entropies = False
    needs_group = False

    def advantages(self, samples: Samples) -> torch.Tensor | None:
        return None
