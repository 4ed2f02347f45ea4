"""The draft tree, and its simplest shape: a chain."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch


def chain_parents(batch: int, depth: int) -> torch.Tensor:
    """Parent index of each node of a chain: int64 [batch, depth], ``-1`` (the last committed token), 0, 1, …"""
    return torch.arange(-1, depth - 1).expand(batch, depth)


@dataclass(slots=True)
class DraftTree:
    """Draft tokens of a batch, ragged by ``lengths``.

    Attributes:
        tokens: int64 [B, N], target token ids; entries past ``lengths`` are arbitrary valid ids.
        parents: int64 [B, N], index of each node's parent, ``-1`` for the last committed token.
        lengths: int64 [B] on the CPU, how many of the N nodes of each row are real: what shapes the next forward must not wait for
            a GPU.
        probs: float32 [B, N, W], the distribution node i was *drawn from*, over the drafter's W tokens; or None when the
            tokens are deterministic, that is, a function of what is already committed.
        vocabulary: int64 [W], target ids of the drafter's tokens; None when W is the target's vocabulary.
    """

    tokens: torch.Tensor
    parents: torch.Tensor
    lengths: torch.Tensor
    probs: torch.Tensor | None = None
    vocabulary: torch.Tensor | None = None

    def narrow(self, depth: int) -> DraftTree:
        """The first ``depth`` nodes, which must include every real one."""
        if depth == self.tokens.shape[1]:
            return self
        probs = None if self.probs is None else self.probs[:, :depth]
        return replace(self, tokens=self.tokens[:, :depth], parents=self.parents[:, :depth], probs=probs)

    def to(self, device: torch.device) -> DraftTree:
        """The same draft on ``device``."""
        probs = None if self.probs is None else self.probs.to(device)
        vocabulary = None if self.vocabulary is None else self.vocabulary.to(device)
        return DraftTree(self.tokens.to(device), self.parents.to(device), self.lengths, probs, vocabulary)


def no_draft(batch: int, device: torch.device) -> DraftTree:
    """A draft of no tokens."""
    nothing = torch.zeros(batch, 0, dtype=torch.long)
    return DraftTree(nothing, chain_parents(batch, 0), torch.zeros(batch, dtype=torch.long)).to(device)
