"""A row of a data set: its conversation, its reference answer and its difficulty, in the shapes that people's
files have.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

from paceline.rl.config.task import ColumnsConfig
from paceline.rl.data.conversations import Message, conversation_of
from paceline.rl.data.golds import gold_of
from paceline.rl.data.row_error import RowError, kind_of

# In this order: where `problem` and `messages` are both there, the latter hold the solution too (NuminaMath,
#     OpenR1).
_PROMPTS = ("prompt", "problem", "question", "messages")
_GOLDS = ("answer", "reward_model.ground_truth", "ground_truth", "final_answer", "solution")
_LEVEL = re.compile(r"Level (\d+)")  # MATH
_ABSENT = object()


@dataclass(frozen=True, slots=True)
class Row:
    """What a row says.

    Attributes:
        turns: The conversation to go on with.
        conversational: Whether the row had messages, and not text.
        gold: The reference answer; empty where none is needed and none is there.
        difficulty: A number, 0 where there is none.
        source: The data set that it comes from, by its own column ``data_source``, or None.
    """

    turns: tuple[Message, ...]
    conversational: bool
    gold: str
    difficulty: float
    source: str | None


def read_row(entry: Any, columns: ColumnsConfig, needs_gold: bool) -> Row:
    """Reads a row by the recipe's mapping of columns, or by the names that are known.

    Args:
        entry: The row's columns by name.
        columns: ``task.columns``.
        needs_gold: Whether a row without a reference answer is refused; a reward function of the user's may
            do without.

    Raises:
        RowError: for a row that cannot be asked or scored.
    """
    prompt_column, prompt = _found(entry, columns.prompt, _PROMPTS)
    gold_column, gold = _found(entry, columns.answer, _GOLDS)
    missing = [
        name
        for name, value, needed in (("prompt", prompt, True), ("answer", gold, needs_gold))
        if value is _ABSENT and needed
    ]
    if missing:
        raise RowError(_says_missing(entry, columns, missing))
    turns = conversation_of(prompt, prompt_column)
    if prompt_column == "messages" and columns.prompt is None and turns[-1]["role"] == "assistant":
        raise RowError(
            "messages ends with a turn of the assistant's, which would be part of the question: leave it "
            "out, or write "
            "task.columns.prompt: messages to let it be continued"
        )
    source = entry.get("data_source")
    return Row(
        turns,
        not isinstance(prompt, str),
        gold_of(gold, gold_column) if needs_gold else _gold_as_it_is(gold),
        _difficulty(entry, columns),
        source if isinstance(source, str) else None,
    )


def _found(entry: Any, mapped: str | None, known: tuple[str, ...]) -> tuple[str, Any]:
    """Name and value of the first column that is there and not null; a null only where there is nothing
    else.
    """
    if not isinstance(entry, dict):
        return known[0], _ABSENT
    found = known[0], _ABSENT
    for column in known if mapped is None else (mapped,):
        value = value_at(entry, column)
        if value is not None and value is not _ABSENT:
            return column, value
        if value is None and found[1] is _ABSENT:
            found = column, value
    return found


def value_at(entry: dict[str, Any], path: str) -> Any:
    """The value of a column, or of a part of it: ``reward_model.ground_truth``, ``messages.0.content``."""
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


def _says_missing(entry: Any, columns: ColumnsConfig, missing: list[str]) -> str:
    if not isinstance(entry, dict):
        return (
            f"no {' and no '.join(missing)}: the row is {kind_of(entry)}; write "
            f'{{"prompt": ..., "answer": ...}}'
        )
    mapped = [
        f"task.columns.{name} {path}" for name in missing if (path := getattr(columns, name)) is not None
    ]
    there = ", ".join(map(str, entry)) or "nothing"
    if mapped:
        return f"no {' and no '.join(mapped)}; the row has {there}"
    return (
        f'no {" and no ".join(missing)}; write {{"prompt": ..., "answer": ...}}, '
        "or name the columns in task.columns "
        f"(the row has {there})"
    )


def _gold_as_it_is(value: Any) -> str:
    """What a reward function of the user's is given as the answer; it has the row's columns as they are
    besides.
    """
    return "" if value is None or value is _ABSENT else str(value)


def _difficulty(entry: dict[str, Any], columns: ColumnsConfig) -> float:
    column = columns.difficulty or "difficulty"
    value = value_at(entry, column)
    if value is _ABSENT and columns.difficulty is not None:
        raise RowError(f"no task.columns.difficulty {column}; the row has {', '.join(map(str, entry))}")
    if value is _ABSENT:
        value = entry.get("level")
        value = value if isinstance(value, str) and _LEVEL.fullmatch(value) else None
    if value is None:
        return 0.0
    level = _LEVEL.fullmatch(value) if isinstance(value, str) else None
    number = int(level[1]) if level is not None else value
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise RowError(f"difficulty is {value!r}; write a number, or leave it out")
    return float(number)
