"""Rules as data: what must hold, and the error where it does not."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Iterable, Mapping

from paceline.rl.errors import UserError

Rule = tuple[bool, str]
"""Whether a recipe keeps the rule, and the one-line error to raise if not."""


def require(rules: Iterable[Rule]) -> None:
    """Raises the error of the first rule that does not hold.

    Raises:
        UserError: One line that names the keys, what is wrong, and what to write.
    """
    for holds, message in rules:
        if not holds:
            raise UserError(message)


def above_zero(values: Mapping[str, float | None]) -> list[Rule]:
    """Returns a rule for each key that its value is finite and above 0, or null."""
    return [
        (value is None or 0 < value < math.inf, f"{key} is {value}: write a number above 0")
        for key, value in values.items()
    ]


def from_zero(values: Mapping[str, float]) -> list[Rule]:
    """Returns a rule for each key that its value is finite and at least 0."""
    return [
        (0 <= value < math.inf, f"{key} is {value}: write a number of at least 0")
        for key, value in values.items()
    ]


def at_least(least: int, values: Mapping[str, int | None], alternative: str = "") -> list[Rule]:
    """Returns a rule for each key that its value is not below ``least``, or null.

    Args:
        least: Smallest allowed value.
        values: Values by key.
        alternative: What else the error proposes, such as ``, or null``.
    """
    return [
        (value is None or value >= least, f"{key} is {value}: write at least {least}{alternative}")
        for key, value in values.items()
    ]


def one_of(names: Collection[str], values: Mapping[str, str]) -> list[Rule]:
    """Returns a rule for each key that its value is one of ``names``.

    Args:
        names: Allowed values, such as the keys of a registry.
        values: Values by key.
    """
    rules: list[Rule] = []
    for key, value in values.items():
        close = difflib.get_close_matches(value, names, n=1, cutoff=0.3)
        proposal = f"; did you mean {close[0]}?" if close else ""
        rules.append((value in names, f"{key} is {value!r}: write one of {', '.join(names)}{proposal}"))
    return rules
