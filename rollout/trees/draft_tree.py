"""Draft tokens of a batch: a chain or a tree for each sequence."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

import torch

MAX_NODES = 63  # ancestors are the bits of an int64
_ROUNDING = 1e-3  # by which a reported distribution's sum may differ from one


class DraftKind(enum.StrEnum):
    """How a draft's tokens came about, which decides what verifies them without changing the target's
    distribution.
    """

    FIXED = "fixed"  # a function of what is committed, siblings distinct; ``probs`` plays no part
    # siblings independently, from one distribution, their number fixed before
    WITH_REPLACEMENT = "drawn with replacement"
    # each sibling from what the ones before it left, or adaptively many of them
    WITHOUT_REPLACEMENT = "drawn without replacement"
    UNLABELLED = "of a kind it does not state"  # a tree with ``probs`` whose drafter says no more


@dataclass(slots=True)
class DraftTree:
    """Draft tokens of a batch, ragged by ``lengths``.

    A node comes after its parent, and siblings come in the order in which they were drawn.

    Attributes:
        tokens: int64 [B, N], target token ids; entries past ``lengths`` are arbitrary valid ids.
        lengths: int64 [B] on the CPU, how many of the N nodes of each row are real: what shapes the next
            forward must not wait for a GPU.
        parents: int64 [B, N], index of each node's parent, ``-1`` for the last committed token; None where
            every row is a chain.
        probs: float32 [B, N, W], the distribution that node i was *drawn from*: the drafter's after the
            parent, and where siblings are drawn without replacement, without those drawn before. None when
            the tokens are deterministic, that is, a function of what is already committed.
        vocabulary: The target ids that the W entries of ``probs`` stand for, in increasing order: int64 [W]
            for all nodes, int64 [B, N, W] for each node its own; None when W is the target's vocabulary.
        kind: How the tokens came about, set where they are drawn. Where it is left out, a draft without
            ``probs`` is fixed, and a chain with ``probs`` is drawn with replacement, having no siblings; a
            tree with ``probs`` stays unlabelled, and only verifiers that take every drawn tree verify it.
    """

    tokens: torch.Tensor
    lengths: torch.Tensor
    parents: torch.Tensor | None = None
    probs: torch.Tensor | None = None
    vocabulary: torch.Tensor | None = None
    kind: DraftKind = DraftKind.UNLABELLED

    def __post_init__(self) -> None:
        if self.kind is not DraftKind.UNLABELLED:
            return
        if self.probs is None:
            self.kind = DraftKind.FIXED
        elif self.parents is None:
            self.kind = DraftKind.WITH_REPLACEMENT

    @property
    def nodes(self) -> int:
        """N, nodes of the widest row."""
        return self.tokens.shape[1]

    def cut(self, lengths: torch.Tensor) -> DraftTree:
        """The first nodes of each row, at most int64 [B] ``lengths`` on the CPU.

        For drawn drafts the cut may depend on what was known before drawing only: a token that is dropped for
        what it is would leave those kept with another distribution than ``probs``.
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
            self.vocabulary
            if self.vocabulary is None or self.vocabulary.ndim == 1
            else self.vocabulary[:, :n],
            self.kind,
        )

    def problem(self, batch: int, vocab_size: int) -> str | None:
        """Why this is no draft of ``batch`` rows over ``vocab_size`` ids, or None, in one line.

        Ids on a GPU are not looked at: that would wait for it.
        """
        shape = tuple(self.tokens.shape)
        if len(shape) != 2 or shape[0] != batch or self.lengths.shape != (batch,):
            return (
                f"its tokens are {list(shape)} and its lengths {list(self.lengths.shape)} for a batch of "
                f"{batch}"
            )
        if batch and not 0 <= int(self.lengths.min()) <= int(self.lengths.max()) <= shape[1]:
            return f"its lengths are not within 0..{shape[1]}, the nodes it has"
        if self.parents is not None and (problem := self._problem_with_parents()) is not None:
            return problem
        if self.tokens.device.type == "cpu" and self.tokens.numel():
            low, high = (int(x) for x in self.tokens.aminmax())
            if low < 0 or high >= vocab_size:
                return f"it drafted the id {low if low < 0 else high}, which is not in the vocabulary"
        return None if self.kind is DraftKind.FIXED else self._problem_with_probs()

    def _problem_with_parents(self) -> str | None:
        assert self.parents is not None
        if self.parents.shape != self.tokens.shape:
            return f"its parents are {list(self.parents.shape)}, its tokens {list(self.tokens.shape)}"
        if self.parents.device.type != "cpu":
            return None
        after = (self.parents >= -1) & (self.parents < torch.arange(self.nodes))
        return (
            None
            if bool((after | ~self._real()).all())
            else "it has a node that does not come after its parent"
        )

    def _problem_with_probs(self) -> str | None:
        if self.probs is None:
            return f"its tokens are {self.kind}, and it gives no probs"
        if self.probs.ndim != 3 or self.probs.shape[:2] != self.tokens.shape:
            return f"its probs are {list(self.probs.shape)}, its tokens {list(self.tokens.shape)}"
        total, least = (
            self.probs.sum(-1),
            self.probs.amin(-1) if self.probs.shape[2] else torch.full(self.tokens.shape, -1.0),
        )
        unreal = ~self._real()
        if not bool((((total - 1).abs() < _ROUNDING) & (least >= 0) | unreal).all()):  # NaN is neither
            return "its draft probabilities are not finite, or are no distribution"
        possible = bool(((draft_mass(self) > 0) | unreal).all())
        return (
            None
            if possible
            else "it drafted a token that its own probs exclude, so it was not drawn from them"
        )

    def _real(self) -> torch.Tensor:
        """bool [B, N], on the device of the tokens."""
        device = self.tokens.device
        return torch.arange(self.nodes, device=device) < self.lengths.to(device)[:, None]

    def to(self, device: torch.device) -> DraftTree:
        """The same draft on ``device``."""
        parents, probs, vocabulary = (
            None if x is None else x.to(device) for x in (self.parents, self.probs, self.vocabulary)
        )
        return DraftTree(self.tokens.to(device), self.lengths, parents, probs, vocabulary, self.kind)


def no_draft(batch: int, device: torch.device) -> DraftTree:
    """A draft of no tokens."""
    return DraftTree(
        torch.zeros(batch, 0, dtype=torch.long, device=device), torch.zeros(batch, dtype=torch.long)
    )


def chain_parents(batch: int, nodes: int) -> torch.Tensor:
    """Parents of chains: int64 [batch, nodes], ``-1``, 0, 1, …"""
    return torch.arange(-1, nodes - 1).expand(batch, nodes)


def tree_shape(parents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Where each node stands.

    Args:
        parents: int64 [B, N], as in `DraftTree`, N at most 63.

    Returns:
        Depth int64 [B, N], 1 for the children of the last committed token, and ancestors int64 [B, N]: bit j
        says that node j is an ancestor of the node or itself.
    """
    nodes = parents.shape[1]
    index = torch.arange(nodes, device=parents.device)
    above = (parents[..., None] == index) | (index[:, None] == index)
    reach = above.float()
    for _ in range((nodes - 1).bit_length()):  # paths of length 1, 2, 4, …
        reach = (reach @ reach).clamp_(max=1)
    reach = reach > 0
    return reach.sum(-1), (reach.long() << index).sum(-1)


def draft_mass(draft: DraftTree) -> torch.Tensor:
    """q(x) of every node's own token: float32 [B, N]; 0 where ``vocabulary`` does not have it."""
    assert draft.probs is not None
    if draft.vocabulary is None:
        return draft.probs.gather(-1, draft.tokens[..., None])[..., 0]
    wanted = draft.tokens[..., None]
    last = draft.vocabulary.shape[-1] - 1
    column = torch.searchsorted(draft.vocabulary, wanted).clamp(max=last)
    found = draft.vocabulary[column] if draft.vocabulary.ndim == 1 else draft.vocabulary.gather(-1, column)
    return torch.where(found == wanted, draft.probs.gather(-1, column), 0.0)[..., 0]


def child_table(draft: DraftTree) -> torch.Tensor:
    """The children of each node in their order.

    Returns:
        int64 [B, N + 1, K], row 0 for the last committed token, row i + 1 for node i; ``-1`` past the K-th
        child of those that have fewer. On the device of the tokens.
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
    # the last place takes what is not real
    at = torch.where(real, (draft.parents + 1) * widest + rank, (nodes + 1) * widest)
    table.scatter_(1, at, index.expand(batch, nodes))
    return table[:, :-1].view(batch, nodes + 1, widest)
