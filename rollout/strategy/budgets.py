"""More draft tokens for the sequences that are expected to run longest."""

from __future__ import annotations

from collections.abc import Callable, Sequence

LONG_SHARE = 0.25
_LONG, _SHORT = 2.0, 2.0 / 3.0


def uniform_budgets(nodes: int, remaining: Sequence[float]) -> list[int]:
    """The same draft tokens for every sequence."""
    return [nodes] * len(remaining)


def length_aware_budgets(nodes: int, remaining: Sequence[float]) -> list[int]:
    """Twice the draft tokens for the quarter of the batch that has most left to decode, two thirds for the
    rest: the same sum.

    DAS (Shao et al., "Beat the Long Tail: Distribution-Aware Speculative Decoding for RL Training", arXiv
    2511.13841): the makespan of a rollout is that of its longest sequences, so these get the aggressive
    budget. Where all are expected to run equally long, all get the same.

    Args:
        nodes: Draft tokens of a sequence on average.
        remaining: Expected tokens left of each.
    """
    count = int(len(remaining) * LONG_SHARE)
    if count == 0 or max(remaining) <= min(remaining):
        return uniform_budgets(nodes, remaining)
    order = sorted(range(len(remaining)), key=lambda i: -remaining[i])
    budgets = [max(int(nodes * _SHORT), 1)] * len(remaining)
    for i in order[:count]:
        budgets[i] = int(nodes * _LONG)
    return budgets


BUDGETS: dict[str, Callable[[int, Sequence[float]], list[int]]] = {
    "uniform": uniform_budgets,
    "length_aware": length_aware_budgets,
}
