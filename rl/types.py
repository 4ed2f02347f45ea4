"""Records that travel through a step: a rank's rollouts, and the samples that the update trains on."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

from paceline.rl.tasks.problems import Problem
from paceline.rollout import Rollout, StepRecord


@dataclass(slots=True)
class RankRollouts:
    """The rollouts of one rank in one step; the samples of a problem are adjacent.

    Attributes:
        problems: The problem of each rollout.
        rollouts: The rollouts.
        seconds: Wall time of decoding.
        records: The records of the engine's decode steps.
        plain_seconds: Wall time of the same requests without speculation, where it was measured.
        plain_identical: The share of completions that were equal without speculation, where it was measured;
            None for vLLM, which draws other tokens, as many as before.
        budgets: The token budget that each rollout was told, where the recipe has budgets.
        places: The index under which each rollout was passed to ``on_finish``.
        paths: The numbers of each rollout's segments, where samples share prefixes.
        drawn: The number of tokens that were decoded; shared prefixes count once.
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

    @property
    def texts(self) -> list[list[int]]:
        """The token ids of each prompt with its completion."""
        return [[*r.request.prompt_ids, *r.token_ids] for r in self.rollouts]

    def joined(self, more: RankRollouts) -> RankRollouts:
        """Returns these rollouts followed by others that were made after them."""
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
    """A completion with what the update needs.

    Attributes:
        prompt: The prompt's token ids, int64 [P].
        completion: The completion's token ids, int64 [L].
        logprobs: Log-probs of the completion's tokens under the engine's policy, float32 [L].
        advantages: The advantage of each token, float32 [L].
        reference: Log-probs under the reference policy, float32 [L], or None.
        values: The critic's values, float32 [L], or None.
        returns: The returns that the values are trained to, float32 [L], or None.
    """

    prompt: torch.Tensor
    completion: torch.Tensor
    logprobs: torch.Tensor
    advantages: torch.Tensor
    reference: torch.Tensor | None = None
    values: torch.Tensor | None = None
    returns: torch.Tensor | None = None
