"""Validates prompts, which are texts or conversations."""

from __future__ import annotations

import re
from typing import Any

from paceline.rl.data.row_error import RowError, kind_of

Message = dict[str, Any]
ROLES = ("system", "user", "assistant")
_PROMPT_HINT = 'write text, or a list of messages {"role": "user", "content": "..."}'
_QUOTED_MESSAGES = re.compile(r"""\s*\[\s*\{\s*['"](role|content|from|value)['"]\s*:""")


def conversation_of(value: Any, column: str) -> tuple[Message, ...]:
    """Returns the turns of a prompt; a text becomes one user turn.

    Args:
        value: The row's value: text, or a list of messages with ``role`` and ``content``.
        column: Name of the column, for errors.

    Raises:
        RowError: If the value is neither, has an unknown role, or holds anything but text.
    """
    if isinstance(value, str):
        if not value.strip():
            raise RowError(f"{column} is {kind_of(value)}; write a question, or remove the row")
        if _QUOTED_MESSAGES.match(value):
            raise RowError(
                f"{column} is text that holds a list of messages; write the list itself, without quotes "
                "around it"
            )
        return ({"role": "user", "content": value},)
    if isinstance(value, dict) and all(isinstance(value.get(name), list) for name in ("role", "content")):
        # a table may hold a list of messages as one list per field
        value = [dict(zip(value, turn, strict=False)) for turn in zip(*value.values(), strict=False)]
    if not isinstance(value, list | tuple) or not value:
        raise RowError(f"{column} is {kind_of(value) if value != [] else 'an empty list'}; {_PROMPT_HINT}")
    turns = tuple(_turn(message, f"{column}[{i}]") for i, message in enumerate(value))
    if all(turn["role"] != "user" for turn in turns):
        raise RowError(f"{column} has no user turn, so there is nothing to answer; add one")
    return turns


def _turn(message: Any, place: str) -> Message:
    """Returns a message with its content as text, without fields that are null.

    Raises:
        RowError: If the message has an unknown role, calls a tool, or holds anything but text.
    """
    if not isinstance(message, dict):
        raise RowError(f'{place} is {kind_of(message)}; write {{"role": "user", "content": "..."}}')
    if "role" not in message or "content" not in message:
        raise RowError(f"{place} has the keys {', '.join(map(str, message))}; write role and content")
    role = message["role"]
    if role not in ROLES:
        raise RowError(f"{place} has the role {role!r}; write one of {', '.join(ROLES)}")
    other_fields = {
        key: value for key, value in message.items() if value is not None and key not in ("role", "content")
    }
    if other_fields.get("tool_calls") or other_fields.get("function_call"):
        raise RowError(f"{place} calls a tool; write the call and its result as text in content")
    return {"role": role, "content": _text_of(message["content"], f"{place}.content"), **other_fields}


def _text_of(content: Any, place: str) -> str:
    """Returns the text of a turn's content; parts of type text are joined.

    Raises:
        RowError: If the content is not text, or is blank.
    """
    if isinstance(content, list | tuple):
        for part in content:
            if (
                not isinstance(part, dict)
                or part.get("type") != "text"
                or not isinstance(part.get("text"), str)
            ):
                kind = (
                    f"a part of type {part['type']}"
                    if isinstance(part, dict) and "type" in part
                    else kind_of(part)
                )
                raise RowError(f"{place} holds {kind}; prompts hold text only, so remove it")
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str) or not content.strip():
        raise RowError(f"{place} is {kind_of(content)}; write text")
    return content


def with_ending(turns: tuple[Message, ...], ending: str) -> tuple[Message, ...]:
    """Returns the conversation with ``ending`` appended to its last user turn."""
    last = max(i for i, turn in enumerate(turns) if turn["role"] == "user")
    extended = {**turns[last], "content": turns[last]["content"] + ending}
    return (*turns[:last], extended, *turns[last + 1 :])


def question_of(turns: tuple[Message, ...]) -> str:
    """Returns the text of the last user turn."""
    return str(next(turn["content"] for turn in reversed(turns) if turn["role"] == "user"))
