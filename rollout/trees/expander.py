"""The interface through which tree builders ask a drafter's model for distributions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

MIN_MASS = 1e-30  # a smaller remaining mass is a rounding error, and is not normalised


class Expander(Protocol):
    """Expands nodes of a draft tree, one level at a time.

    Attributes:
        vocabulary: int64 [W], target ids of the drafter's tokens; None when W is the target's vocabulary.
        temperatures: float32 [B], temperatures of the requests; 1 where a request is greedy.
    """

    vocabulary: torch.Tensor | None
    temperatures: torch.Tensor

    def root(self) -> torch.Tensor:
        """Returns the logits [B, W] after the last committed token."""
        ...

    def expand(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Expands E more nodes of each row and returns the logits [B, E, W] after them.

        Args:
            tokens: int64 [B, E], target ids of the nodes.
            parents: int64 [B, E], each node's parent as an index into the nodes expanded so far, in the order
                of their expansion; ``-1`` for the root.
        """
        ...


@dataclass(frozen=True, slots=True)
class TreeLimits:
    """The largest size of a draft.

    Attributes:
        depth: Number of levels.
        width: Children of a node, and nodes of a level that are expanded.
        nodes: Draft tokens of each sequence.
    """

    depth: int
    width: int
    nodes: int


# (first, count) → float64 [B, count], random numbers of the step for drawing drafts, uniform in [0, 1)
Uniform = Callable[[int, int], torch.Tensor]


def log_probs(logits: torch.Tensor, temperatures: torch.Tensor) -> torch.Tensor:
    """Returns float32 log-probs [B, ..., W] of logits [B, ..., W] at temperatures [B]."""
    shape = (-1,) + (1,) * (logits.ndim - 1)
    return torch.log_softmax(logits.float() / temperatures.view(shape), dim=-1)


def target_ids(columns: torch.Tensor, vocabulary: torch.Tensor | None) -> torch.Tensor:
    """Maps columns of the drafter's vocabulary to target ids of the same shape."""
    return columns if vocabulary is None else vocabulary[columns]


def draw_without_replacement(
    probs: torch.Tensor, noise: torch.Tensor, count: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Draws ``count`` distinct tokens, in the order in which drawing one after another would give them.

    Gumbel-top-k (Kool, van Hoof, Welling: "Stochastic Beams and Where to Find Them", arXiv 1903.06059,
    section 2.3): the largest values of log q + Gumbel noise are a sample without replacement, in order.

    Args:
        probs: float32 [..., W].
        noise: float64 [..., W], uniform in [0, 1).
        count: Number of tokens, at most W.

    Returns:
        int64 [..., count], the drawn columns, and float32 [..., count, W], the distribution that each was
        drawn from: q without the columns before it, normalised. Where only tokens without mass are left, the
        choice among them is fixed, and the distribution puts all its mass on the chosen one.
    """
    gumbel = -torch.log((-torch.log1p(-noise.double())).clamp(min=1e-300))  # noise < 1, so log1p is finite
    chosen = (probs.double().clamp(min=0).log() + gumbel).topk(count, dim=-1).indices
    one_hot = torch.zeros_like(probs).unsqueeze(-2).repeat_interleave(count, dim=-2)
    one_hot.scatter_(-1, chosen.unsqueeze(-1), 1.0)
    drawn_before = one_hot.cumsum(-2) - one_hot
    left = probs.unsqueeze(-2) * (1 - drawn_before)
    mass = left.sum(-1, keepdim=True)
    return chosen, torch.where(mass > MIN_MASS, left / mass.clamp(min=MIN_MASS), one_hot)
