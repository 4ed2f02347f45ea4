"""Finds the answer in a completion, and normalises answers for comparison."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

_FINAL_ANSWER = re.compile(r"Answer[*_]{0,3}:[ \t]*(.*)")
_TAGS = re.compile(r"</?(?:answer|b|code|em|i|strong|u)>", re.IGNORECASE)
_DELIMITERS = (
    ("$$", "$$"),
    ("$", "$"),
    (r"\(", r"\)"),
    (r"\[", r"\]"),
    ("*", "*"),
    ("_", "_"),
    ('"', '"'),
    ("'", "'"),
    ("“", "”"),
)
_EMPHASIS = re.compile(r"(?<![\w)\]}])(\*\*|__)(?=\S)(.+?)(?<=\S)\1(?![\w(\[{])")  # keeps 2**3, a power
_UNPAIRED_EMPHASIS = re.compile(r"^[*_]+\s*|\s*[*_]+$")  # its other mark lies outside the answer
_COMMA = re.compile(r"\s*,\s*")
_COMMAND = re.compile(r"\\(?:boxed|fbox|text|textbf|mathbf|mathrm)\{([^{}]*)\}")


def final_answer(completion: str) -> str | None:
    """Returns the text after the last ``Answer:`` up to the end of its line, or None if that is empty."""
    answers = _FINAL_ANSWER.findall(completion)
    return answers[-1].strip() or None if answers else None


def without_markup(text: str) -> str:
    """Removes Markdown emphasis and code marks, surrounding math signs and quotes, and pictographs."""
    text = "".join(c for c in _TAGS.sub("", text).replace("`", "") if not _is_pictograph(c)).strip()
    previous = None
    while text != previous:
        previous = text
        text = _EMPHASIS.sub(r"\2", text)
        for begin, end in _DELIMITERS:
            inner = text[len(begin) : -len(end)]
            if inner and text.startswith(begin) and text.endswith(end) and end not in inner:
                text = inner.strip()
        text = _UNPAIRED_EMPHASIS.sub("", text)
    return text


def _is_pictograph(character: str) -> bool:
    """Whether a character is an emoji, or joins or colours one.

    The degree sign is not one, although it is of the same Unicode category.
    """
    category = unicodedata.category(character)
    return (
        (category in ("So", "Cf") and character != "°")
        or character == "\ufe0f"
        or "\U0001f3fb" <= character <= "\U0001f3ff"
    )


def normalized(text: str) -> str:
    """Returns a form in which equal answers compare equal.

    Differences in markup, case, white space, surrounding brackets and a final stop are removed.
    """
    text = without_markup(text)
    while (unwrapped := _COMMAND.sub(r"\1", text)) != text:
        text = unwrapped
    text = _COMMA.sub(", ", " ".join(without_markup(text).casefold().split())).rstrip(".!").strip()
    while len(text) > 2 and text[0] + text[-1] in ("()", "[]", "{}") and not set(text[1:-1]) & set("()[]{},"):
        text = text[1:-1].strip()
    return text


def boxed(completion: str) -> str | None:
    r"""Returns the content of the last ``\boxed{}``, or None if there is none that is closed."""
    begin = completion.rfind(r"\boxed{")
    depth = 0
    for index in range(begin + 6, len(completion)) if begin >= 0 else ():
        depth += {"{": 1, "}": -1}.get(completion[index], 0)
        if depth == 0:
            return completion[begin + 7 : index]
    return None


def answer_start(token_ids: Sequence[int], marker: str, tokenizer: Any) -> int:
    """Returns the index of the first token after the marker's first appearance in the text.

    Finds it by bisection over prefixes, each of which is decoded as a whole, so only few are decoded.

    Args:
        token_ids: Token ids of a completion.
        marker: Text after which the answer begins.
        tokenizer: The policy's tokenizer.

    Returns:
        The index, or the number of tokens if the marker does not appear.
    """

    def prefix_has_marker(count: int) -> bool:
        return marker in tokenizer.decode(token_ids[:count], skip_special_tokens=True)

    low, high = 0, len(token_ids)
    if not prefix_has_marker(high):
        return high
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if prefix_has_marker(middle) else (middle, high)
    return high
