"""Reads a row's conversation, reference answer and difficulty, in the formats of common data sets."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from paceline.rl.config.task import ColumnsConfig
from paceline.rl.data.conversations import Message, conversation_of
from paceline.rl.data.golds import gold_of
from paceline.rl.data.row_error import RowError, kind_of

# The order matters: NuminaMath and OpenR1 have both `problem` and `messages`, and messages hold the solution.
_PROMPT_COLUMNS = ("prompt", "problem", "question", "messages")
_ANSWER_COLUMNS = ("answer", "reward_model.ground_truth", "ground_truth", "final_answer", "solution")
_LEVEL = re.compile(r"Level (\d+)")  # difficulty as the MATH data set writes it
_ABSENT = object()  # tells a missing column from one that is null


@dataclass(frozen=True, slots=True)
class Row:
    """The parsed content of a row.

    Attributes:
        turns: Conversation to continue.
        conversational: Whether the row's prompt was a list of messages rather than text.
        gold: Reference answer; empty if none is needed and there is none.
        difficulty: Difficulty, 0 if there is none.
        source: Data set that the row comes from, by its column ``data_source``, or None.
    """

    turns: tuple[Message, ...]
    conversational: bool
    gold: str
    difficulty: float
    source: str | None


def read_row(entry: Any, columns: ColumnsConfig, needs_gold: bool) -> Row:
    """Parses a row by the recipe's column mapping, or by well-known column names.

    Args:
        entry: The row's columns by name.
        columns: The mapping ``task.columns``.
        needs_gold: Whether a row must have a reference answer; the user's reward functions may do without.

    Raises:
        RowError: If the row has no valid prompt, or no valid answer although one is needed.
    """
    prompt_column, prompt = _first_present(entry, columns.prompt, _PROMPT_COLUMNS)
    gold_column, gold = _first_present(entry, columns.answer, _ANSWER_COLUMNS)
    missing = [
        name
        for name, value, needed in (("prompt", prompt, True), ("answer", gold, needs_gold))
        if value is _ABSENT and needed
    ]
    if missing:
        raise RowError(_missing_message(entry, columns, missing))
    turns = conversation_of(prompt, prompt_column)
    if prompt_column == "messages" and columns.prompt is None and turns[-1]["role"] == "assistant":
        raise RowError(
            "messages ends with an assistant turn, which would become part of the prompt; remove it, or set "
            "task.columns.prompt: messages to have the policy continue it"
        )
    source = entry.get("data_source")
    return Row(
        turns,
        not isinstance(prompt, str),
        gold_of(gold, gold_column) if needs_gold else _raw_gold(gold),
        _difficulty(entry, columns),
        source if isinstance(source, str) else None,
    )


def _first_present(entry: Any, mapped: str | None, known: tuple[str, ...]) -> tuple[str, Any]:
    """Returns name and value of the first column that exists and is not null.

    If there is none, returns the first that is null, or else the first known name with `_ABSENT`.

    Args:
        entry: The row's columns by name.
        mapped: Column that the recipe names, or None.
        known: Well-known names to try in order if the recipe names none.
    """
    if not isinstance(entry, dict):
        return known[0], _ABSENT
    fallback = known[0], _ABSENT
    for column in known if mapped is None else (mapped,):
        value = value_at(entry, column)
        if value is not None and value is not _ABSENT:
            return column, value
        if value is None and fallback[1] is _ABSENT:
            fallback = column, value
    return fallback


def value_at(entry: dict[str, Any], path: str) -> Any:
    """Returns the value of a column, or of a path such as ``messages.0.content``, or `_ABSENT`."""
    if path in entry:
        return entry[path]
    value: Any = entry
    for part in path.split("."):
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdigit() and int(part) < len(value):
            value = value[int(part)]
        else:
            return _ABSENT
    return value


def _missing_message(entry: Any, columns: ColumnsConfig, missing: list[str]) -> str:
    """Describes which columns are missing, and those that the row has."""
    if not isinstance(entry, dict):
        return (
            f"no {' and no '.join(missing)}: the row is {kind_of(entry)}; write "
            f'{{"prompt": ..., "answer": ...}}'
        )
    mapped = [
        f"column {path} (task.columns.{name})"
        for name in missing
        if (path := getattr(columns, name)) is not None
    ]
    present = ", ".join(map(str, entry)) or "nothing"
    if mapped:
        return f"no {' and no '.join(mapped)}; write one of the row's columns: {present}"
    return (
        f'no {" and no ".join(missing)}; write {{"prompt": ..., "answer": ...}}, '
        f"or name the columns in task.columns (the row has {present})"
    )


def _raw_gold(value: Any) -> str:
    """Returns the answer as text for the user's reward functions, which also get the raw columns."""
    return "" if value is None or value is _ABSENT else str(value)


def _difficulty(entry: dict[str, Any], columns: ColumnsConfig) -> float:
    """Returns the row's difficulty as a number, 0 if it has none.

    Raises:
        RowError: If the mapped column is missing, or the value is not a finite number.
    """
    column = columns.difficulty or "difficulty"
    value = value_at(entry, column)
    if value is _ABSENT and columns.difficulty is not None:
        raise RowError(
            f"no column {column} (task.columns.difficulty); write one of the row's columns: "
            f"{', '.join(map(str, entry))}"
        )
    if value is _ABSENT:
        value = entry.get("level")
        value = value if isinstance(value, str) and _LEVEL.fullmatch(value) else None
    if value is None:
        return 0.0
    level = _LEVEL.fullmatch(value) if isinstance(value, str) else None
    number = int(level[1]) if level is not None else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise RowError(f"difficulty is {value!r}; write a number, or remove it")
    return float(number)
