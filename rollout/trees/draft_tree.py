"""Draft tokens of a batch: a chain or a tree for each sequence."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

MOST_NODES = 63  # ancestors are the bits of an int64


@dataclass(slots=True)
class DraftTree:
    """Draft tokens of a batch, ragged by ``lengths``.

    A node comes after its parent, and siblings come in the order in which they were drawn.

    Attributes:
        tokens: int64 [B, N], target token ids; entries past ``lengths`` are arbitrary valid ids.
        lengths: int64 [B] on the CPU, how many of the N nodes of each row are real: what shapes the next forward must not wait for
            a GPU.
        parents: int64 [B, N], index of each node's parent, ``-1`` for the last committed token; None where every row is a chain.
        probs: float32 [B, N, W], the distribution that node i was *drawn from*: the drafter's after the parent, and where siblings
            are drawn without replacement, without those drawn before. None when the tokens are deterministic, that is, a
            function of what is already committed.
        vocabulary: The target ids that the W entries of ``probs`` stand for, in increasing order: int64 [W] for all nodes,
            int64 [B, N, W] for each node its own; None when W is the target's vocabulary.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    parents: torch.Tensor | None = None
    probs: torch.Tensor | None = None
    vocabulary: torch.Tensor | None = None

    @property
    def nodes(self) -> int:
        """N, nodes of the widest row."""
        return self.tokens.shape[1]

    def cut(self, lengths: torch.Tensor) -> DraftTree:
        """The first nodes of each row, at most int64 [B] ``lengths`` on the CPU.

        For drawn drafts the cut may depend on what was known before drawing only: a token that is dropped for what it is
        would leave those kept with another distribution than ``probs``.
        """
        lengths = torch.minimum(self.lengths, lengths)
        n = int(lengths.max()) if len(lengths) else 0
        if n == self.nodes:
            return replace(self, lengths=lengths)
        return DraftTree(
            self.tokens[:, :n],
            lengths,
            None if self.parents is None else self.parents[:, :n],
            None if self.probs is None else self.probs[:, :n],
            self.vocabulary if self.vocabulary is None or self.vocabulary.ndim == 1 else self.vocabulary[:, :n],
        )

    def problem(self, vocab_size: int) -> str | None:
        """Why this is no draft over ``vocab_size`` ids, or None. Ids on a GPU are not looked at: that would wait for it."""
        if self.probs is not None and not bool(torch.isfinite(self.probs).all()):
            return "its draft probabilities are not finite"
        if self.tokens.device.type == "cpu" and self.tokens.numel():
            low, high = (int(x) for x in self.tokens.aminmax())
            if low < 0 or high >= vocab_size:
                return f"it drafted the id {low if low < 0 else high}, which is not in the vocabulary"
        return None

    def to(self, device: torch.device) -> DraftTree:
        """The same draft on ``device``."""
        moved = [None if x is None else x.to(device) for x in (self.parents, self.probs, self.vocabulary)]
        return DraftTree(self.tokens.to(device), self.lengths, *moved)


def no_draft(batch: int, device: torch.device) -> DraftTree:
    """A draft of no tokens."""
    return DraftTree(torch.zeros(batch, 0, dtype=torch.long, device=device), torch.zeros(batch, dtype=torch.long))


def chain_parents(batch: int, nodes: int) -> torch.Tensor:
    """Parents of chains: int64 [batch, nodes], ``-1``, 0, 1, …"""
    return torch.arange(-1, nodes - 1).expand(batch, nodes)


def tree_shape(parents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each node stands.

    Args:
        parents: int64 [B, N], as in `DraftTree`, N at most 63.

    Returns:
        Depth int64 [B, N], 1 for the children of the last committed token, and ancestors int64 [B, N]: bit j says that node j is an
        ancestor of the node or itself.
    """
    nodes = parents.shape[1]
    index = torch.arange(nodes, device=parents.device)
    above = (parents[..., None] == index) | (index[:, None] == index)
    reach = above.float()
    for _ in range((nodes - 1).bit_length()):  # paths of length 1, 2, 4, …
        reach = (reach @ reach).clamp_(max=1)
    reach = reach > 0
    return reach.sum(-1), (reach.long() << index).sum(-1)


def child_table(draft: DraftTree) -> torch.Tensor:
    """The children of each node in their order.

    Returns:
        int64 [B, N + 1, K], row 0 for the last committed token, row i + 1 for node i; ``-1`` past the K-th child of those that
        have fewer. On the device of the tokens.
    """
    batch, nodes = draft.tokens.shape
    device = draft.tokens.device
    index = torch.arange(nodes, device=device)
    real = index < draft.lengths.to(device)[:, None]
    if draft.parents is None:
        table = torch.full((batch, nodes + 1, 1), -1, device=device)
        table[:, :nodes, 0] = torch.where(real, index, -1)
        return table
    same = (draft.parents[:, :, None] == draft.parents[:, None, :]) & (index[:, None] > index)
    rank = same.sum(-1)
    widest = int(torch.where(real, rank, 0).max()) + 1 if nodes else 1
    table = torch.full((batch, (nodes + 1) * widest + 1), -1, device=device)
    at = torch.where(real, (draft.parents + 1) * widest + rank, (nodes + 1) * widest)  # the last place takes what is not real
    table.scatter_(1, at, index.expand(batch, nodes))
    return table[:, :-1].view(batch, nodes + 1, widest)
