"""Prompts as conversations: what a row's prompt may be, and what is refused."""

from __future__ import annotations

import re
from typing import Any

from paceline.rl.data.row_error import RowError, kind_of

Message = dict[str, Any]
ROLES = ("system", "user", "assistant")
_WRITE = 'write text, or a list of messages {"role": "user", "content": "..."}'
_LISTED = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")


def conversation_of(value: Any, column: str) -> tuple[Message, ...]:
    """Returns the turns of a prompt; a text becomes one user turn.

    Args:
        value: As read from the row: text, or a list of messages with ``role`` and ``content``.
        column: Its name, for messages.

    Raises:
        RowError: for anything else, for unknown roles, and for what is not text.
    """
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"{column} is {kind_of(value)}: write a question, or leave the row out")
        if _LISTED.match(value):
            raise RowError(
                f"{column} is text that holds a list of messages: write the list itself, without quotes "
                "around it"
            )
        return ({"role": "user", "content": value},)
    if isinstance(value, dict) and all(isinstance(value.get(name), list) for name in ("role", "content")):
        # a table's columns of turns
        value = [dict(zip(value, turn, strict=False)) for turn in zip(*value.values(), strict=False)]
    if not isinstance(value, list | tuple) or not value:
        raise RowError(f"{column} is {kind_of(value) if value != [] else 'an empty list'}: {_WRITE}")
    turns = tuple(_turn(message, f"{column}[{i}]") for i, message in enumerate(value))
    if all(turn["role"] != "user" for turn in turns):
        raise RowError(f"{column} has no turn of the user's: there is nothing to answer")
    return turns


def _turn(message: Any, place: str) -> Message:
    if not isinstance(message, dict):
        raise RowError(f'{place} is {kind_of(message)}: write {{"role": "user", "content": "..."}}')
    if "role" not in message or "content" not in message:
        raise RowError(f"{place} has the keys {', '.join(map(str, message))}: write role and content")
    role = message["role"]
    if role not in ROLES:
        raise RowError(f"{place} has the role {role!r}: write one of {', '.join(ROLES)}")
    more = {
        key: value for key, value in message.items() if value is not None and key not in ("role", "content")
    }
    if more.get("tool_calls") or more.get("function_call"):
        raise RowError(f"{place} calls a tool: write what was called and what it gave as text in content")
    return {"role": role, "content": _text_of(message["content"], f"{place}.content"), **more}


def _text_of(content: Any, place: str) -> str:
    """A turn's text; parts of type text are joined."""
    if isinstance(content, list | tuple):
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                what = (
                    f"a part of type {part['type']}"
                    if isinstance(part, dict) and "type" in part
                    else kind_of(part)
                )
                raise RowError(f"{place} holds {what}: prompts hold text only")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not content.strip():
        raise RowError(f"{place} is {kind_of(content)}: write text")
    return content


def with_ending(turns: tuple[Message, ...], ending: str) -> tuple[Message, ...]:
    """The same conversation with ``ending`` after the last turn of the user's."""
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
    asked = {**turns[last], "content": turns[last]["content"] + ending}
    return (*turns[:last], asked, *turns[last + 1 :])


def question_of(turns: tuple[Message, ...]) -> str:
    """The text of the last turn of the user's."""
    return str(next(turn["content"] for turn in reversed(turns) if turn["role"] == "user"))
