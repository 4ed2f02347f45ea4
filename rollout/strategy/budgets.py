"""Budgets of draft tokens: how many each sequence of a batch gets."""

from __future__ import annotations

from collections.abc import Callable, Sequence

LONG_SHARE = 0.25  # share of the batch that counts as stragglers
_LONG_FACTOR, _SHORT_FACTOR = 2.0, 2.0 / 3.0  # 0.25 · 2 + 0.75 · 2/3 = 1: the sum of budgets stays


def uniform_budgets(nodes: int, remaining: Sequence[float]) -> list[int]:
    """Gives every sequence the same number of draft tokens."""
    return [nodes] * len(remaining)


def length_aware_budgets(nodes: int, remaining: Sequence[float]) -> list[int]:
    """Gives more draft tokens to the sequences that are expected to run longest.

    DAS (Shao et al., "Beat the Long Tail: Distribution-Aware Speculative Decoding for RL Training", arXiv
    2511.13841): the makespan of a rollout is that of its stragglers, so these get the aggressive budget. The
    quarter of the batch with the most tokens left gets twice the draft tokens, the rest two thirds, which
    keeps the sum. When all are expected to run equally long, all get the same.

    Args:
        nodes: Average number of draft tokens of a sequence.
        remaining: Expected tokens left of each sequence.
    """
    count = int(len(remaining) * LONG_SHARE)
    if count == 0 or max(remaining) <= min(remaining):
        return uniform_budgets(nodes, remaining)
    order = sorted(range(len(remaining)), key=lambda i: -remaining[i])
    budgets = [max(int(nodes * _SHORT_FACTOR), 1)] * len(remaining)
    for i in order[:count]:
        budgets[i] = int(nodes * _LONG_FACTOR)
    return budgets


BUDGETS: dict[str, Callable[[int, Sequence[float]], list[int]]] = {
    "uniform": uniform_budgets,
    "length_aware": length_aware_budgets,
}
