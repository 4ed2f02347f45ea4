"""The records that travel through a step: what a rank has decoded, and what the update trains on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from paceline.rl.tasks.problems import Problem
from paceline.rollout import Rollout, StepRecord


@dataclass(slots=True)
class RankRollouts:
    """What one rank produced in one step; the samples of a problem are adjacent.

    Attributes:
        problems: One for each rollout.
        rollouts: In the same order.
        seconds: Wall time.
        records: The engine's decode steps.
        plain_seconds: Wall time of the same requests without speculation, where that was measured.
        plain_identical: Share of them whose tokens were the same, where that was measured.
        budgets: Tokens that each was asked for, where the recipe asks for some.
        places: Under which each was handed to ``on_finish``.
        paths: Segments of each, by number, where samples share beginnings.
        drawn: Tokens that were decoded for them.
    """

    problems: list[Problem]
    rollouts: list[Rollout]
    seconds: float
    records: list[StepRecord] = field(default_factory=list)
    plain_seconds: float | None = None
    plain_identical: float | None = None
    budgets: list[int] | None = None
    places: list[int] = field(default_factory=list)
    paths: list[tuple[int, ...]] | None = None
    drawn: int = 0

    def joined(self, more: RankRollouts) -> RankRollouts:
        """These, and others that were made after them."""
        later = [replace(record, at=record.at + self.seconds) for record in more.records]
        budgets = (
            [*self.budgets, *more.budgets] if self.budgets is not None and more.budgets is not None else None
        )
        paths = [*self.paths, *more.paths] if self.paths is not None and more.paths is not None else None
        return RankRollouts(
            [*self.problems, *more.problems],
            [*self.rollouts, *more.rollouts],
            self.seconds + more.seconds,
            [*self.records, *later],
            budgets=budgets,
            paths=paths,
            drawn=self.drawn + more.drawn,
        )


@dataclass(frozen=True, slots=True)
class TrainingSample:
    """A rollout with what the update needs to know of it.

    Attributes:
        prompt, completion: int64 [P], [L], token ids.
        logprobs: float32 [L], the engine's, one a token.
        advantages: float32 [L].
        reference: float32 [L], log-probs of the reference policy, or None.
        values, returns: float32 [L], the critic's, and what they should have been, or None.
    """

    prompt: torch.Tensor
    completion: torch.Tensor
    logprobs: torch.Tensor
    advantages: torch.Tensor
    reference: torch.Tensor | None = None
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None
