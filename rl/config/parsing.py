"""Parses mappings into dataclasses, strictly.

An unknown key or a value of the wrong type raises a one-line `UserError` that names the key, its file and
the nearest valid choice.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import types
import typing
from typing import Any, Literal, TypeVar

import yaml

from paceline.rl.errors import UserError

T = TypeVar("T")


def apply_override(data: dict[str, Any], override: str) -> None:
    """Applies an override to nested mappings, in place.

    Args:
        data: Keys of a recipe; missing sections are created.
        override: ``key.sub=value``; the value is parsed as YAML.

    Raises:
        UserError: The override has no ``=``, a key before the last names a value instead of a section, or
            the value is not valid YAML.
    """
    key, separator, value = override.partition("=")
    if not separator or not key:
        raise UserError(f"override {override!r}: write key=value, for example update.lr=1e-6")
    *parents, last = key.split(".")
    for depth, parent in enumerate(parents, 1):
        if data.get(parent) is None:
            data[parent] = {}
        data = data[parent]
        if not isinstance(data, dict):
            path = ".".join(parents[:depth])
            raise UserError(f"override {override!r}: {path} is a value, not a section; write {path}=VALUE")
    try:
        data[last] = yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError(
            f"override {override!r}: the value is not valid YAML; check its brackets and quotes, and "
            "quote it for the shell"
        ) from None


def parse(kind: type[T], data: dict[str, Any], where: str, prefix: str = "") -> T:
    """Builds a dataclass from a mapping, checking every key and type.

    Args:
        kind: The dataclass; fields that are dataclasses themselves are nested mappings.
        data: Values by key. YAML's peculiarities are accepted: an int or text such as ``1e-6`` for a float, a
            list for a tuple, false for the words ``no`` and ``off``.
        where: Source of the data, which errors begin with, such as the recipe's path.
        prefix: Path of the section, which errors put before its keys, such as ``policy.``.

    Raises:
        UserError: A key does not exist, or a value has the wrong type.
    """
    hints = typing.get_type_hints(kind)
    names = {f.name for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
    for key in data:
        if key not in names:
            close = difflib.get_close_matches(str(key), names, n=1)
            hint = f"did you mean {prefix}{close[0]}?" if close else f"valid keys: {', '.join(sorted(names))}"
            raise UserError(f"{where}: unknown key {prefix}{key}; {hint}")
    return kind(**{key: _convert(hints[key], value, where, prefix + key) for key, value in data.items()})


def _convert(hint: Any, value: Any, where: str, key: str) -> Any:
    """Converts a value to a key's type, item by item in lists.

    Raises:
        UserError: The value has the wrong type, or is none of the words that the key allows.
    """
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        kinds = [a for a in arguments if a is not type(None)]  # a value, or a list of sections instead
        lists = [a for a in kinds if typing.get_origin(a) is tuple]
        return _convert(
            lists[0] if lists and isinstance(value, list | tuple) else kinds[0], value, where, key
        )
    if origin is Literal:
        if value is False and (words := [word for word in ("no", "off") if word in arguments]):
            return words[0]  # YAML 1.1 reads an unquoted no or off as false
        if value not in arguments:
            close = difflib.get_close_matches(str(value), [str(a) for a in arguments], n=1, cutoff=0.3)
            hint_text = f"; did you mean {close[0]}?" if close else ""
            raise UserError(
                f"{where}: {key} is {value!r}; write one of {', '.join(map(str, arguments))}{hint_text}"
            )
        return value
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, dict):
            raise UserError(f"{where}: {key} is {value!r}; write a section with keys of its own")
        return parse(hint, value, where, key + ".")
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise UserError(f"{where}: {key} is {value!r}; write a list")
        return tuple(_convert(arguments[0], item, where, f"{key}[{i}]") for i, item in enumerate(value))
    return _scalar(hint, origin, value, where, key)


def _scalar(hint: Any, origin: Any, value: Any, where: str, key: str) -> Any:
    """Converts a number, text, bool or mapping."""
    wanted = origin or hint
    if wanted is float and isinstance(value, str):  # YAML 1.1 reads 1e-6 as text
        with contextlib.suppress(ValueError):
            value = float(value)
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, wanted) or (isinstance(value, bool) and wanted is not bool):
        raise UserError(f"{where}: {key} is {value!r}; write a value of type {wanted.__name__}")
    return value
