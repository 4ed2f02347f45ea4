"""Extracts a row's reference answer, also from a worked solution."""

from __future__ import annotations

import math
import re
from typing import Any

from paceline.rl.data.row_error import RowError, kind_of

_BOXED = re.compile(r"\\(?:boxed|fbox)\s*")
_LINE_BREAK = re.compile(r"\s*\n\s*")
_MATH_DELIMITERS = (("$$", "$$"), ("$", "$"), (r"\[", r"\]"), (r"\(", r"\)"))
_MAX_SOLUTION_CHARACTERS = 200  # a longer `solution` is prose, which no completion can equal


def gold_of(value: Any, column: str) -> str:
    r"""Returns the reference answer as text, without surrounding math delimiters.

    It is what follows the last ``####`` (GSM8K), what the last ``\boxed`` holds (MATH), or the value itself.

    Args:
        value: The row's value.
        column: Name of the column, for errors.

    Raises:
        RowError: If no completion could match the value.
    """
    if isinstance(value, str):
        text = value.strip()
    elif isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        text = str(value)
    else:
        raise RowError(f"{column} is {kind_of(value)}; write one answer, as text or as a number")
    if "####" in text:
        text = text.rpartition("####")[2].strip()
    elif _BOXED.search(text):
        text = _last_boxed(text, column)
    elif column == "solution" and ("\n" in text or len(text) > _MAX_SOLUTION_CHARACTERS):
        raise RowError(
            "solution marks no answer; write it in \\boxed{}, after ####, or in a separate column answer"
        )
    # a completion's answer is read from one line, and LaTeX treats a line break as a space
    text = _LINE_BREAK.sub(" ", _without_dollars(text))
    if not text:
        raise RowError(f"{column} holds no answer; write one, or remove the row")
    return text


def _last_boxed(text: str, column: str) -> str:
    r"""Returns the content of the last ``\boxed{…}``, or the word after a ``\boxed`` without braces.

    Raises:
        RowError: If its brace is not closed.
    """
    begin = [match.end() for match in _BOXED.finditer(text)][-1]
    if text[begin : begin + 1] != "{":
        return re.split(r"[\s$]", text[begin:], maxsplit=1)[0]
    depth = 0
    for end in range(begin, len(text)):
        escaped = text[end - 1] == "\\"
        depth += 0 if escaped else (text[end] == "{") - (text[end] == "}")
        if depth == 0:
            return text[begin + 1 : end].strip()
    raise RowError(f"{column} has a \\boxed{{ that is not closed; is the text cut off?")


def _without_dollars(text: str) -> str:
    r"""Removes math delimiters around a whole text: ``$x$``, ``$$x$$``, ``\(x\)``, ``\[x\]`` become ``x``."""
    for left, right in _MATH_DELIMITERS:
        inner = text[len(left) : -len(right)]
        if (
            len(text) >= len(left) + len(right)
            and text.startswith(left)
            and text.endswith(right)
            and left not in inner
        ):
            return inner.strip()
    return text
