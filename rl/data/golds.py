"""The reference answer of a row, taken out of a worked solution where it is given as one."""

from __future__ import annotations

import math
import re
from typing import Any

from paceline.rl.data.row_error import RowError, kind_of

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*")
_LINES = re.compile(r"\s*\n\s*")
_MATH = (("$$", "$$"), ("$", "$"), (r"\[", r"\]"), (r"\(", r"\)"))
_ONE_LINE = 200  # characters: a longer `solution` is prose, and no completion can equal it


def gold_of(value: Any, column: str) -> str:
    """The reference answer as text: what follows the last ``####`` (GSM8K), what the last ``\\boxed`` holds
    (MATH), or the value itself, without the dollar signs around it.

    Args:
        value: As read from the row.
        column: Its name, for messages.

    Raises:
        RowError: for a value that no completion can match.
    """
    if isinstance(value, str):
        text = value.strip()
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        text = str(value)
    else:
        raise RowError(f"{column} is {kind_of(value)}: write one answer, as text or as a number")
    if "####" in text:
        text = text.rpartition("####")[2].strip()
    elif _BOXED.search(text):
        text = _last_boxed(text, column)
    elif column == "solution" and ("\n" in text or len(text) > _ONE_LINE):
        raise RowError(
            "solution marks no answer: write it in \\boxed{}, after ####, or in a column answer of its own"
        )
    # an answer is read from one line; to LaTeX both are spaces
    text = _LINES.sub(" ", _without_dollars(text))
    if not text:
        raise RowError(f"{column} holds no answer: write one, or leave the row out")
    return text


def _last_boxed(text: str, column: str) -> str:
    """The content of the last ``\\boxed{…}``, or the word after a ``\\boxed`` without braces."""
    begin = [found.end() for found in _BOXED.finditer(text)][-1]
    if text[begin : begin + 1] != "{":
        return re.split(r"[\s$]", text[begin:], maxsplit=1)[0]
    depth = 0
    for end in range(begin, len(text)):
        escaped = text[end - 1] == "\\"
        depth += 0 if escaped else (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[begin + 1 : end].strip()
    raise RowError(f"{column} has a \\boxed{{ that is not closed: is the text cut off?")


def _without_dollars(text: str) -> str:
    """``$x$``, ``$$x$$``, ``\\(x\\)`` and ``\\[x\\]`` as ``x``, where the signs surround the whole text."""
    for left, right in _MATH:
        inner = text[len(left) : -len(right)]
        if (
            len(text) >= len(left) + len(right)
            and text.startswith(left)
            and text.endswith(right)
            and left not in inner
        ):
            return inner.strip()
    return text
