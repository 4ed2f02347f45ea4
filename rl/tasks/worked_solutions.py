"""Worked solutions for a supervised warm-up: the form of a chain of thought that ends in a marked answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paceline.rl.errors import UserError


def chain_sum(entry: dict[str, Any]) -> str:
    """One line for each running sum, then the answer: ``4 - 1 = 3`` / ``3 + 7 = 10`` / ``Answer: 10``."""
    first, *rest = entry["metadata"]["expression"].split(" ")
    total, lines = int(first), []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        following = total + int(term) if operator == "+" else total - int(term)
        lines.append(f"{total} {operator} {term} = {following}")
        total = following
    return "\n".join([*lines, f"Answer: {total}"])


def with_rechecks(solution: str, times: int) -> str:
    """The same with its lines gone through again, each time under ``Check:``, before the answer."""
    *lines, answer = solution.split("\n")
    again = ["Check:", *lines] * times
    return "\n".join([*lines, *again, answer])


SOLUTIONS: dict[str, Callable[[dict[str, Any]], str]] = {"chain_sum": chain_sum}


def worked_solution(dataset: str, entry: dict[str, Any]) -> str:
    """A solution of one reasoning-gym entry.

    Raises:
        UserError: for a data set without a recipe.
    """
    if dataset not in SOLUTIONS:
        raise UserError(
            f"policy.warmup: no worked solutions for {dataset!r}; there are some for: "
            f"{', '.join(sorted(SOLUTIONS))}"
        )
    return SOLUTIONS[dataset](entry)
