"""Worked solutions for a supervised warm-up: chains of thought that end in a marked answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paceline.rl.errors import UserError


def chain_sum(entry: dict[str, Any]) -> str:
    """Writes one line per running sum, then the answer: ``4 - 1 = 3`` / ``3 + 7 = 10`` / ``Answer: 10``."""
    first, *rest = entry["metadata"]["expression"].split(" ")
    total, lines = int(first), []
    for operator, term in zip(rest[::2], rest[1::2], strict=True):
        new_total = total + int(term) if operator == "+" else total - int(term)
        lines.append(f"{total} {operator} {term} = {new_total}")
        total = new_total
    return "\n".join([*lines, f"Answer: {total}"])


def with_rechecks(solution: str, times: int) -> str:
    """Inserts the solution's lines again before its answer, each time under ``Check:``.

    Args:
        solution: Lines of a solution, the last of which is the answer.
        times: Number of repetitions.
    """
    *lines, answer = solution.split("\n")
    rechecks = ["Check:", *lines] * times
    return "\n".join([*lines, *rechecks, answer])


SOLUTIONS: dict[str, Callable[[dict[str, Any]], str]] = {"chain_sum": chain_sum}


def worked_solution(dataset: str, entry: dict[str, Any]) -> str:
    """Returns a solution of a reasoning-gym entry.

    Args:
        dataset: Name of the data set.
        entry: The data set's entry.

    Raises:
        UserError: If there are no worked solutions for the data set.
    """
    if dataset not in SOLUTIONS:
        raise UserError(
            f"policy.warmup: there are no worked solutions for {dataset!r}; use one of "
            f"{', '.join(sorted(SOLUTIONS))}"
        )
    return SOLUTIONS[dataset](entry)
