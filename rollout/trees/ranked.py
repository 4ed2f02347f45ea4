"""Trees of the drafter's likeliest continuations: EAGLE-2's dynamic tree and OPT-Tree."""

from __future__ import annotations

import torch

from paceline.rollout.trees.builder import TreeBuilder
from paceline.rollout.trees.draft_tree import DraftKind, DraftTree
from paceline.rollout.trees.expander import Expander, TreeLimits, log_probs, target_ids


def grow_dynamic(expander: Expander, limits: TreeLimits) -> DraftTree:
    """Expands the most confident nodes of each level, then keeps the most confident nodes of all levels.

    EAGLE-2 (Li et al., arXiv 2406.16858, sections 4.1 and 4.2): the value of a node is the product of the
    drafter's probabilities on its path, which estimates the probability that the node is accepted. The
    ``width`` nodes of largest value of a level are expanded, each to its ``width`` likeliest tokens. Of all
    nodes, the ``nodes`` of largest value are verified. A child's value never exceeds its parent's, so these
    nodes form a tree.

    The tree is a function of the committed tokens, hence deterministic.
    """
    candidates = _Candidates(expander, limits)
    for _ in range(limits.depth - 1):
        candidates.expand(limits.width)
    return candidates.best()


def grow_opt_tree(expander: Expander, limits: TreeLimits, gain: float) -> DraftTree:
    """Builds the tree with the largest expected acceptance length for a budget of nodes.

    OPT-Tree (Wang et al., "OPT-Tree: Speculative Decoding with Adaptive Draft Tree Structure", arXiv
    2406.17276, section 3 and algorithm 1): with the drafter's path probability as the chance that a node is
    accepted, the expected acceptance length is the sum of these chances over the tree, so the best tree
    consists of the ``nodes`` nodes of largest value. Only nodes among these can have children among them, so
    only they are expanded. Drafting stops when a level adds less than ``gain`` to the expectation, averaged
    over the batch.

    Args:
        expander: The drafter's model.
        limits: Size of the tree; ``width`` bounds both the expanded nodes of a level and the children of
            each.
        gain: Minimum expected tokens per sequence that a further level must add.
    """
    candidates = _Candidates(expander, limits)
    expected = candidates.expected_length()
    for _ in range(limits.depth - 1):
        wanted = candidates.worth_expanding()
        if wanted == 0:
            break
        candidates.expand(min(wanted, limits.width))
        before, expected = expected, candidates.expected_length()
        if expected - before < gain:
            break
    return candidates.best()


class _Candidates:
    """All nodes found so far with their values; in each row, a node comes after its parent."""

    def __init__(self, expander: Expander, limits: TreeLimits) -> None:
        self._expander, self._limits = expander, limits
        root = log_probs(expander.root(), expander.temperatures)
        self._width = min(limits.width, root.shape[-1])
        values, columns = root.topk(self._width, dim=-1)
        self._tokens = target_ids(columns, expander.vocabulary)
        self._values = values
        self._parents = torch.full_like(columns, -1)
        self._newest = 0  # index of the first candidate of the newest level
        # indices of the expanded candidates, in the order of their expansion
        self._expanded = torch.zeros(len(values), 0, dtype=torch.long, device=values.device)

    def expand(self, count: int) -> None:
        """Gives children to the ``count`` best nodes of the newest level."""
        newest = self._values[:, self._newest :]
        frontier = newest.topk(min(count, newest.shape[1]), dim=-1).indices + self._newest
        above = self._parents.gather(1, frontier)
        is_parent = (self._expanded[:, None, :] == above[..., None]).float()
        order = torch.where(is_parent.any(-1), is_parent.argmax(-1), -1) if self._expanded.shape[1] else above
        logits = self._expander.expand(self._tokens.gather(1, frontier), order)
        self._expanded = torch.cat([self._expanded, frontier], dim=1)
        values, columns = log_probs(logits, self._expander.temperatures).topk(self._width, dim=-1)
        self._newest = self._values.shape[1]
        self._values = torch.cat(
            [self._values, (self._values.gather(1, frontier)[..., None] + values).flatten(1)], dim=1
        )
        self._tokens = torch.cat(
            [self._tokens, target_ids(columns, self._expander.vocabulary).flatten(1)], dim=1
        )
        children = frontier[..., None].expand(-1, -1, self._width).flatten(1)
        self._parents = torch.cat([self._parents, children], dim=1)

    def _threshold(self) -> torch.Tensor:
        """Returns [B, 1], the value of the worst node that is still within the budget."""
        best = self._values.topk(min(self._limits.nodes, self._values.shape[1]), dim=-1).values
        return best[:, -1:]

    def worth_expanding(self) -> int:
        """Returns how many nodes of the newest level are within the budget, in the row that has the most."""
        return int((self._values[:, self._newest :] >= self._threshold()).sum(-1).max())

    def expected_length(self) -> float:
        """Returns the expected number of accepted tokens of the best tree so far, averaged over the batch."""
        best = self._values.topk(min(self._limits.nodes, self._values.shape[1]), dim=-1).values
        return float(best.exp().sum(-1).mean())

    def best(self) -> DraftTree:
        """Returns the nodes of largest value, largest first.

        Ties go to the node found first, so that no node precedes its parent.
        """
        nodes = min(self._limits.nodes, self._values.shape[1])
        order = self._values.sort(dim=-1, descending=True, stable=True).indices
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(order.shape[1], device=order.device).expand_as(order)
        )
        kept = order[:, :nodes]
        above = self._parents.gather(1, kept)
        parents = torch.where(above >= 0, rank.gather(1, above.clamp(min=0)), -1)
        lengths = torch.full((len(kept),), nodes)
        return DraftTree(self._tokens.gather(1, kept), lengths, parents, kind=DraftKind.FIXED)


# Ranked trees compare tokens by their probabilities, so that their tokens cannot be drawn.
DYNAMIC = TreeBuilder(
    lambda expander, limits, options: grow_dynamic(expander, limits), ("likeliest",), fixed_work=True
)
OPT_TREE = TreeBuilder(
    lambda expander, limits, options: grow_opt_tree(expander, limits, options.gain), ("likeliest",)
)
