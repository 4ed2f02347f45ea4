"""Draft tokens of a batch: a chain or a tree for each sequence."""

from __future__ import annotations

import enum
from dataclasses import dataclass, replace

import torch

from paceline.rollout.native import upload

MAX_NODES = 63  # the set of a node's ancestors is the bits of an int64
_NO_DISTRIBUTION = "its draft probabilities are not finite, or are no distribution"
_SUM_TOLERANCE = 1e-3  # float32 rounding lets the sum of a reported distribution differ from one


class DraftKind(enum.StrEnum):
    """How a draft's tokens were chosen.

    The kind decides which verifiers keep the target's distribution.
    """

    FIXED = "fixed"  # a function of the committed tokens, with distinct siblings; ``probs`` is not used
    # siblings are independent draws from one distribution, and their number is fixed before drawing
    WITH_REPLACEMENT = "drawn with replacement"
    # a sibling is drawn from what the ones before it left, or the number of siblings is adaptive
    WITHOUT_REPLACEMENT = "drawn without replacement"
    UNLABELLED = "of a kind it does not state"  # a tree with ``probs`` whose drafter gave no kind


@dataclass(slots=True)
class DraftTree:
    """Draft tokens of a batch, ragged by ``lengths``.

    A node comes after its parent, and siblings stand in the order in which they were drawn.

    Attributes:
        tokens: int64 [B, N], target token ids; entries past ``lengths`` are arbitrary valid ids.
        lengths: int64 [B] on the CPU, how many of the N nodes of each row are real. It lives on the CPU
            because it shapes the next forward, which must not wait for a GPU.
        parents: int64 [B, N], index of each node's parent, ``-1`` for the last committed token; None when
            every row is a chain.
        probs: float32 [B, N, W], the distribution that node i was *drawn from*: the drafter's distribution
            after the parent, and for siblings drawn without replacement, that distribution without the
            siblings drawn earlier. None when the tokens are deterministic, that is, a function of the
            committed tokens.
        vocabulary: Target ids of the W entries of ``probs``, in increasing order: int64 [W] when all nodes
            share them, int64 [B, N, W] when each node has its own; None when W is the target's vocabulary.
        kind: How the tokens were chosen, set by whatever draws them. When it is left out, a draft without
            ``probs`` is FIXED, and a chain with ``probs`` is drawn WITH_REPLACEMENT, since it has no
            siblings. A tree with ``probs`` stays UNLABELLED, and only verifiers that accept every drawn tree
            verify it.
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
        """The number of nodes N of the widest row."""
        return self.tokens.shape[1]

    def cut(self, lengths: torch.Tensor) -> DraftTree:
        """Returns the first nodes of each row, at most ``lengths`` (int64 [B] on the CPU) of them.

        For drawn drafts the cut may depend only on what was known before drawing: dropping a token because of
        its value would give the remaining ones another distribution than ``probs``.
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
        """Checks that this is a draft of ``batch`` rows over ``vocab_size`` token ids.

        Token ids on a GPU are not checked, because that would wait for the GPU.

        Returns:
            One line that says what is wrong, or None.
        """
        shape = tuple(self.tokens.shape)
        if len(shape) != 2 or shape[0] != batch or self.lengths.shape != (batch,):
            return (
                f"its tokens have shape {list(shape)} and its lengths {list(self.lengths.shape)} "
                f"for a batch of {batch}"
            )
        if batch and not 0 <= int(self.lengths.min()) <= int(self.lengths.max()) <= shape[1]:
            return f"its lengths are not within 0..{shape[1]}, its number of nodes"
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
            return f"its parents have shape {list(self.parents.shape)}, its tokens {list(self.tokens.shape)}"
        if self.parents.device.type != "cpu":
            return None
        ordered = (self.parents >= -1) & (self.parents < torch.arange(self.nodes))
        return (
            None
            if bool((ordered | ~self._real(self.parents.device)).all())
            else "it has a node that does not come after its parent"
        )

    def _problem_with_probs(self) -> str | None:
        if self.probs is None:
            return f"its tokens are {self.kind}, but it gives no probs"
        if self.probs.ndim != 3 or self.probs.shape[:2] != self.tokens.shape:
            return f"its probs have shape {list(self.probs.shape)}, its tokens {list(self.tokens.shape)}"
        if self.probs.shape[2] == 0:
            return _NO_DISTRIBUTION
        total, smallest = self.probs.sum(-1), self.probs.amin(-1)
        padding = ~self._real(self.probs.device)
        valid = ((total - 1).abs() < _SUM_TOLERANCE) & (smallest >= 0)  # both are false for NaN
        checks = torch.stack([(valid | padding).all(), ((draft_mass(self) > 0) | padding).all()])
        distributions, possible = checks.tolist()
        if not distributions:
            return _NO_DISTRIBUTION
        return (
            None
            if possible
            else "it drafted a token that its own probs exclude, so it was not drawn from them"
        )

    def _real(self, device: torch.device) -> torch.Tensor:
        """Returns bool [B, N] on ``device``, which nodes are real."""
        return torch.arange(self.nodes, device=device) < upload(self.lengths, device)[:, None]

    def to(self, device: torch.device) -> DraftTree:
        """Returns the draft with its tensors on ``device``; ``lengths`` stay on the CPU."""
        tokens, parents, probs, vocabulary = (
            x if x is None or x.device == device else upload(x, device)
            for x in (self.tokens, self.parents, self.probs, self.vocabulary)
        )
        assert tokens is not None
        return DraftTree(tokens, self.lengths, parents, probs, vocabulary, self.kind)

    def for_target(self, device: torch.device) -> DraftTree:
        """Returns the draft as the target's forward reads it: on ``device``, but with parents on the CPU.

        Parents shape the forward, as ``lengths`` do.
        """
        parents = None if self.parents is None else self.parents.cpu()
        return replace(replace(self, parents=None).to(device), parents=parents)


def no_draft(batch: int, device: torch.device) -> DraftTree:
    """Returns a draft without tokens for ``batch`` sequences."""
    return DraftTree(
        torch.zeros(batch, 0, dtype=torch.long, device=device), torch.zeros(batch, dtype=torch.long)
    )


def chain_parents(batch: int, nodes: int) -> torch.Tensor:
    """Returns the parents of chains: int64 [batch, nodes], each row ``-1``, 0, 1, …."""
    return torch.arange(-1, nodes - 1).expand(batch, nodes)


def tree_shape(parents: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes each node's depth and its set of ancestors.

    Args:
        parents: int64 [B, N], as in `DraftTree`; N is at most 63.

    Returns:
        Depth int64 [B, N], 1 for the children of the last committed token, and ancestors int64 [B, N]: bit j
        is set when node j is the node itself or one of its ancestors.
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
    """Returns q(x) of every node's own token: float32 [B, N], 0 where ``vocabulary`` lacks the token."""
    assert draft.probs is not None
    if draft.vocabulary is None:
        return draft.probs.gather(-1, draft.tokens[..., None])[..., 0]
    tokens = draft.tokens[..., None]
    last = draft.vocabulary.shape[-1] - 1
    column = torch.searchsorted(draft.vocabulary, tokens).clamp(max=last)
    nearest = draft.vocabulary[column] if draft.vocabulary.ndim == 1 else draft.vocabulary.gather(-1, column)
    return torch.where(nearest == tokens, draft.probs.gather(-1, column), 0.0)[..., 0]


def child_table(draft: DraftTree) -> torch.Tensor:
    """Lists the children of each node in their order.

    Nothing waits for a GPU where the parents are on the CPU, as after `DraftTree.for_target`.

    Returns:
        int64 [B, N + 1, K] on the device of the tokens: row 0 for the last committed token, row i + 1 for
        node i. Nodes with fewer than K children are padded with ``-1``.
    """
    batch, nodes = draft.tokens.shape
    device = draft.tokens.device if draft.parents is None else draft.parents.device
    index = torch.arange(nodes, device=device)
    real = index < upload(draft.lengths, device)[:, None]
    if draft.parents is None:
        table = torch.full((batch, nodes + 1, 1), -1, device=device)
        table[:, :nodes, 0] = torch.where(real, index, -1)
        return table
    earlier_sibling = (draft.parents[:, :, None] == draft.parents[:, None, :]) & (index[:, None] > index)
    rank = earlier_sibling.sum(-1)
    widest = int(torch.where(real, rank, 0).max()) + 1 if nodes else 1
    table = torch.full((batch, (nodes + 1) * widest + 1), -1, device=device)
    # nodes that are not real are written to an extra last column, which is then dropped
    at = torch.where(real, (draft.parents + 1) * widest + rank, (nodes + 1) * widest)
    table.scatter_(1, at, index.expand(batch, nodes))
    return upload(table[:, :-1].view(batch, nodes + 1, widest), draft.tokens.device)
