"""Trees of tokens drawn from the drafter's distributions: fixed shapes, and DySpec's greedy expansion."""

from __future__ import annotations

import torch

from paceline.rollout.native import upload
from paceline.rollout.sampling import draw
from paceline.rollout.trees.builder import TreeBuilder
from paceline.rollout.trees.draft_tree import MAX_NODES, DraftKind, DraftTree
from paceline.rollout.trees.expander import (
    Expander,
    TreeLimits,
    Uniform,
    draw_without_replacement,
    log_probs,
    target_ids,
)


def grow_static(expander: Expander, limits: TreeLimits, uniform: Uniform, replacement: bool) -> DraftTree:
    """Draws a tree of fixed shape, whose branching factor halves from level to level.

    The root has ``width`` children. This is the k-configuration of Multi-Candidate SD (Yang et al., arXiv
    2401.06706) and the constant branching of Recursive SD (Jeon et al., arXiv 2402.14160). The shape is known
    before anything is drawn, and nodes are ordered by level.

    Args:
        expander: The drafter's model.
        limits: Size of the tree; a level that does not fit into ``nodes`` as a whole is left out, and so are
            those below it.
        uniform: Random numbers of the step.
        replacement: Whether siblings are drawn independently; otherwise they are drawn without replacement.
    """
    tree = _Drawn(expander, uniform)
    children, level, parents = limits.width, 1, [-1]
    while level <= limits.depth and tree.nodes + len(parents) * children <= limits.nodes:
        parents = tree.add_level(parents, children, replacement)
        children, level = max(children // 2, 1), level + 1
    return tree.finish()


def grow_dyspec(expander: Expander, limits: TreeLimits, uniform: Uniform) -> DraftTree:
    """Expands the nodes that are likeliest to be accepted, one level at a time.

    DySpec (Xiong et al., "DySpec: Faster Speculative Decoding with Dynamic Token Tree Structure", arXiv
    2410.11744, its threshold variant): a node that may get a further child has the value v, the product of
    the drafter's probabilities on its path times the mass that its earlier children left. The next child,
    drawn without replacement from what is left (a distribution r), gets v · r(x), and the node keeps v · (1 −
    r(x)). A node gets children while v is at least the threshold, here one over the budget.

    Whether a child is drawn depends on the children before it and never on the child itself, as
    `verify_recursive` requires.
    """
    tree = _Drawn(expander, uniform)
    batch = len(expander.temperatures)
    values = torch.ones(batch, 1, dtype=torch.float64)
    left = torch.full((batch,), limits.nodes)
    parents, threshold = [-1], 1 / limits.nodes
    for _ in range(limits.depth):
        if not parents:
            break
        if tree.expanded + len(parents) > MAX_NODES:
            break
        width = min(limits.width, max(limits.nodes // len(parents), 1))
        first = tree.nodes
        parents = tree.add_level(parents, width, replacement=False)
        drawn = tree.drawn_mass(first).view(batch, -1, width)  # r(x) of each child, in order
        left_mass = torch.cat([torch.ones_like(drawn[..., :1]), (1 - drawn).cumprod(-1)[..., :-1]], -1)
        before = values[..., None] * left_mass
        wanted = (before >= threshold).flatten(1)
        wanted &= wanted.long().cumsum(-1) <= left[:, None]
        left -= wanted.sum(-1)
        tree.keep(first, wanted)
        alive = wanted.any(0)
        if not bool((left > 0).any()):
            break
        values = torch.where(wanted, (before * drawn).flatten(1), 0.0)[:, alive]
        parents = [node for node, real in zip(parents, alive.tolist(), strict=True) if real]
    return tree.finish()


class _Drawn:
    """Nodes ordered by level, with the distribution that each was drawn from.

    All rows have the same shape; `keep` notes which nodes are real.
    """

    def __init__(self, expander: Expander, uniform: Uniform) -> None:
        self._expander, self._uniform = expander, uniform
        self._used = 0
        self._columns: list[torch.Tensor] = []
        self._probs: list[torch.Tensor] = []
        self._parents: list[int] = []
        self._kept: dict[int, torch.Tensor] = {}
        self._level = log_probs(expander.root(), expander.temperatures).exp()[:, None]
        self._expanded: list[int] = []
        self._kind = DraftKind.WITH_REPLACEMENT

    @property
    def nodes(self) -> int:
        """The number of nodes."""
        return len(self._parents)

    @property
    def expanded(self) -> int:
        """The number of nodes that were expanded."""
        return len(self._expanded)

    def add_level(self, parents: list[int], children: int, replacement: bool) -> list[int]:
        """Draws ``children`` children of each of ``parents`` and returns the new nodes.

        Args:
            parents: Nodes of the newest level, or ``[-1]`` for the root.
            children: Children of each, at most the drafter's vocabulary.
            replacement: Whether siblings are drawn independently.
        """
        if parents != [-1]:
            self._expand(parents)
        batch, count, width = self._level.shape
        children = min(children, width)
        if replacement:
            noise = self._numbers(count * children).view(batch, count, children)
            q = self._level[:, :, None].expand(-1, -1, children, -1)
            columns = draw(q.reshape(-1, width), noise.flatten()).view(batch, count, children)
        else:
            noise = self._numbers(count * width).view(batch, count, width)
            columns, q = draw_without_replacement(self._level, noise, children)
            self._kind = DraftKind.WITHOUT_REPLACEMENT
        first_new = self.nodes
        self._columns.append(columns.flatten(1))
        self._probs.append(q.flatten(1, 2))
        self._parents += [p for p in parents for _ in range(children)]
        return list(range(first_new, self.nodes))

    def _numbers(self, count: int) -> torch.Tensor:
        self._used += count
        return upload(self._uniform(self._used - count, count), self._level.device)

    def _expand(self, nodes: list[int]) -> None:
        columns = torch.cat(self._columns, 1)
        columns = columns.index_select(1, upload(nodes, columns.device))
        tokens = target_ids(columns, self._expander.vocabulary)
        place = {node: order for order, node in enumerate(self._expanded)}
        above = upload([place.get(self._parents[n], -1) for n in nodes], tokens.device)
        logits = self._expander.expand(tokens, above.expand(len(tokens), -1))
        self._expanded += nodes
        self._level = log_probs(logits, self._expander.temperatures).exp()

    def drawn_mass(self, first: int) -> torch.Tensor:
        """Returns the probability of each node from ``first`` on under the distribution it was drawn from.

        Returns:
            float64 [B, n] on the CPU.
        """
        columns, probs = torch.cat(self._columns, 1)[:, first:], torch.cat(self._probs, 1)[:, first:]
        return probs.gather(-1, columns[..., None])[..., 0].double().cpu()

    def keep(self, first: int, wanted: torch.Tensor) -> None:
        """Notes which of the nodes from ``first`` on are real: bool [B, n].

        A node can be real only where its parent is.
        """
        self._kept[first] = wanted

    def finish(self) -> DraftTree:
        """Returns the draft: the real nodes of each row, ordered by level."""
        columns, probs = torch.cat(self._columns, 1), torch.cat(self._probs, 1)
        batch, nodes = columns.shape
        vocabulary = self._expander.vocabulary
        parents = upload(self._parents, columns.device).expand(batch, -1)
        if not self._kept:
            lengths = torch.full((batch,), nodes)
            return DraftTree(
                target_ids(columns, vocabulary), lengths, parents.contiguous(), probs, vocabulary, self._kind
            )
        real = torch.cat([self._kept[first] for first in sorted(self._kept)], 1)
        lengths = real.sum(-1)
        real = upload(real, columns.device)
        order = (~real).long().sort(dim=-1, stable=True).indices
        rank = torch.empty_like(order).scatter_(
            1, order, torch.arange(nodes, device=order.device).expand_as(order)
        )
        above = parents.gather(1, order)
        parents = torch.where(above >= 0, rank.gather(1, above.clamp(min=0)), -1)
        longest = int(lengths.max())
        picked = order[:, :longest]
        picked_probs = probs.gather(1, picked[..., None].expand(-1, -1, probs.shape[-1]))
        tokens = target_ids(columns.gather(1, picked), vocabulary)
        return DraftTree(tokens, lengths, parents[:, :longest], picked_probs, vocabulary, self._kind)


STATIC = TreeBuilder(
    lambda expander, limits, options: grow_static(expander, limits, options.uniform, options.replacement),
    ("replacement", "without_replacement"),
)
DYSPEC = TreeBuilder(
    lambda expander, limits, options: grow_dyspec(expander, limits, options.uniform),
    ("without_replacement",),
)
