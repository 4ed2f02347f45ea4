"""What a model-based drafter offers to the builders of its trees."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

MIN_MASS = 1e-30


class Expander(Protocol):
    """Expands nodes of a draft tree, a level at a time.

    Attributes:
        vocabulary: int64 [W], target ids of the drafter's tokens; None when W is the target's vocabulary.
        temperatures: float32 [B] of the requests; 1 where the request is greedy.
    """

    vocabulary: torch.Tensor | None
    temperatures: torch.Tensor

    def root(self) -> torch.Tensor:
        """Logits [B, W] after the last committed token."""
        ...

    def expand(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Logits [B, E, W] after E more nodes of each row.

        Args:
            tokens: int64 [B, E], target ids.
            parents: int64 [B, E], which of the nodes expanded before, in their order, each hangs on; ``-1``
                for the root.
        """
        ...


@dataclass(frozen=True, slots=True)
class TreeLimits:
    """How large a draft may be.

    Attributes:
        depth: Levels.
        width: Children of a node, and nodes of a level that are expanded.
        nodes: Draft tokens of each sequence.
    """

    depth: int
    width: int
    nodes: int


# (first, count) → float64 [B, count] of the step's numbers for drawing
Uniform = Callable[[int, int], torch.Tensor]


def log_probs(logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """float32 [..., W] from logits [B, ..., W] and temperatures [B]."""
    shape = (-1,) + (1,) * (logits.ndim - 1)
    return torch.log_softmax(logits.float() / temperatures.view(shape), dim=-1)


def target_ids(columns: torch.Tensor, vocabulary: torch.Tensor | None) -> torch.Tensor:
    """The drafter's tokens as target ids, same shape."""
    return columns if vocabulary is None else vocabulary[columns]


def draw_without_replacement(
    probs: torch.Tensor, noise: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """``count`` distinct tokens in the order in which drawing one after another gives them.

    Gumbel-top-k (Kool, van Hoof, Welling: "Stochastic Beams and Where to Find Them", arXiv 1903.06059,
    section 2.3): the largest of log q + Gumbel noise are a sample without replacement, in order.

    Args:
        probs: float32 [..., W].
        noise: float64 [..., W], uniform in [0, 1).
        count: At most W.

    Returns:
        int64 [..., count], and float32 [..., count, W]: what each was drawn from, q without those before it,
            normalised. Where
        nothing was left but tokens of no mass, the choice among them is fixed, and that row has all its mass
        there.
    """
    race = -torch.log((-torch.log1p(-noise.double())).clamp(min=1e-300))  # 1 − u is never 0
    chosen = (probs.double().clamp(min=0).log() + race).topk(count, dim=-1).indices
    taken = torch.zeros_like(probs).unsqueeze(-2).repeat_interleave(count, dim=-2)
    taken.scatter_(-1, chosen.unsqueeze(-1), 1.0)
    before = taken.cumsum(-2) - taken
    left = probs.unsqueeze(-2) * (1 - before)
    mass = left.sum(-1, keepdim=True)
    return chosen, torch.where(mass > MIN_MASS, left / mass.clamp(min=MIN_MASS), taken)
