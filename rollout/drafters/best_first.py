"""Deterministic drafts by best-first search over estimated continuations."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch

from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import DraftKind, DraftTree

State = TypeVar("State")
Following = Callable[[State], Iterable[tuple[float, int, State]]]
Row = list[tuple[int, int]]  # token and parent of each node


def best_first(start: State, following: Following[State], strategy: Strategy) -> Row:
    """Returns the nodes of largest value, largest first, each after its parent.

    The value of a node is the product of the estimated probabilities on its path.

    Args:
        start: State at the last committed token.
        following: State → (estimated probability, token, state after it), likeliest first, with distinct
            tokens. At most the strategy's width of them become children.
        strategy: Bounds on depth, width and nodes.
    """
    row: Row = []
    heap: list[tuple[float, int, int, int, int, State]] = []
    order = 0

    def push(value: float, parent: int, depth: int, state: State) -> None:
        nonlocal order
        for children, (probability, token, after) in enumerate(following(state)):
            if children == strategy.width:
                break
            heapq.heappush(heap, (-value * probability, order, token, parent, depth, after))
            order += 1

    push(1.0, -1, 1, start)
    while heap and len(row) < strategy.nodes:
        negative, _, token, parent, depth, after = heapq.heappop(heap)
        row.append((token, parent))
        if depth < strategy.depth:
            push(-negative, len(row) - 1, depth + 1, after)
    return row


def pack(rows: Sequence[Row], width: int) -> DraftTree:
    """Packs the rows into one draft, of chains if ``width`` is 1."""
    nodes = max((len(row) for row in rows), default=0)
    lengths = torch.tensor([len(row) for row in rows])
    padded = [row + [(0, len(row) - 1 + i) for i in range(nodes - len(row))] for row in rows]
    packed = torch.tensor(padded, dtype=torch.long).view(len(rows), nodes, 2)
    parents = None if width == 1 else packed[..., 1].contiguous()
    return DraftTree(packed[..., 0], lengths, parents, kind=DraftKind.FIXED)
