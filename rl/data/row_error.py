"""The error for an invalid row."""

from __future__ import annotations

from typing import Any


class RowError(Exception):
    """Says in one line what is wrong with a row and what to write instead.

    Callers that know the row's location put it in front.
    """


def kind_of(value: Any) -> str:
    """Describes a value in the words of JSON, for messages."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return "text" if value.strip() else "blank text"
    if isinstance(value, int | float):
        return f"the number {value}"
    names: dict[type, str] = {list: "a list", tuple: "a list", dict: "an object"}
    return names.get(type(value), f"a value of type {type(value).__name__}")
