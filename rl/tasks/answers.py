"""The final answer of a completion, and texts without their markup."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

_ANSWER = re.compile(r"Answer[*_]{0,3}:[ \t]*(.*)")
_TAGS = re.compile(r"</?(?:answer|b|code|em|i|strong|u)>", re.IGNORECASE)
_PAIRS = (
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
_EMPHASIS = re.compile(r"(?<![\w)\]}])(\*\*|__)(?=\S)(.+?)(?<=\S)\1(?![\w(\[{])")  # 2**3 is a power
_STRAY = re.compile(r"^[*_]+\s*|\s*[*_]+$")  # of marks that began or end outside of the answer
_COMMA = re.compile(r"\s*,\s*")
_COMMAND = re.compile(r"\\(?:boxed|fbox|text|textbf|mathbf|mathrm)\{([^{}]*)\}")


def final_answer(completion: str) -> str | None:
    """The text after the last ``Answer:``, up to the end of its line; None when there is none or it is
    empty.
    """
    found = _ANSWER.findall(completion)
    return found[-1].strip() or None if found else None


def without_markup(text: str) -> str:
    """The text without Markdown's emphasis and code marks, the signs of a formula around it, quotation marks
    and pictographs.
    """
    text = "".join(c for c in _TAGS.sub("", text).replace("`", "") if not _is_pictograph(c)).strip()
    before = None
    while text != before:
        before = text
        text = _EMPHASIS.sub(r"\2", text)
        for begin, end in _PAIRS:
            inner = text[len(begin) : -len(end)]
            if inner and text.startswith(begin) and text.endswith(end) and end not in inner:
                text = inner.strip()
        text = _STRAY.sub("", text)
    return text


def _is_pictograph(character: str) -> bool:
    """Emoji with what joins and colours them; the sign of degrees is of the same category and stays."""
    category = unicodedata.category(character)
    return (
        (category in ("So", "Cf") and character != "°")
        or character == "\ufe0f"
        or "\U0001f3fb" <= character <= "\U0001f3ff"
    )


def normalized(text: str) -> str:
    """A form in which answers that differ in markup, case, white space, brackets around them or a final stop
    are equal.
    """
    text = without_markup(text)
    while (bare := _COMMAND.sub(r"\1", text)) != text:
        text = bare
    text = _COMMA.sub(", ", " ".join(without_markup(text).casefold().split())).rstrip(".!").strip()
    while len(text) > 2 and text[0] + text[-1] in ("()", "[]", "{}") and not set(text[1:-1]) & set("()[]{},"):
        text = text[1:-1].strip()
    return text


def boxed(completion: str) -> str | None:
    """What the last ``\\boxed{}`` holds, or None where there is none that ends."""
    begin = completion.rfind(r"\boxed{")
    depth = 0
    for place in range(begin + 6, len(completion)) if begin >= 0 else ():
        depth += {"{": 1, "}": -1}.get(completion[place], 0)
        if depth == 0:
            return completion[begin + 7 : place]
    return None


def answer_start(token_ids: Sequence[int], marker: str, tokenizer: Any) -> int:
    """Index of the first token after the marker's first appearance; the number of tokens where it does not
    appear.

    Each prefix is decoded as a whole, and only a few: an answer's start is found by bisection.
    """

    def holds(count: int) -> bool:
        return marker in tokenizer.decode(token_ids[:count], skip_special_tokens=True)

    low, high = 0, len(token_ids)
    if not holds(high):
        return high
    while low + 1 < high:
        middle = (low + high) // 2
        low, high = (low, middle) if holds(middle) else (middle, high)
    return high
