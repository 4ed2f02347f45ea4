"""Conversion of user-given numbers and lists (Python, numpy or torch), and one-line text for messages."""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_MAX_REPR_LENGTH = 60  # keeps an error message on one readable line


def short_repr(value: object) -> str:
    """Returns one short line that shows a value in a message, even if its ``repr`` fails."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # an object with a broken repr is still named by its type
        text = f"a {type(value).__name__}"
    return text if len(text) <= _MAX_REPR_LENGTH else text[: _MAX_REPR_LENGTH - 3] + "..."


def error_line(error: Exception) -> str:
    """Returns an error's type and the first 200 characters of its message, on one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def as_int(value: Any) -> int | None:
    """Returns an integer of Python, numpy or a zero-dimensional torch tensor as an int.

    Returns None for anything else, including booleans and 2.0.
    """
    if type(value) is int:
        return value
    if isinstance(value, bool | np.bool_) or (
        isinstance(value, torch.Tensor) and (value.ndim > 0 or value.dtype == torch.bool)
    ):
        return None
    try:
        return operator.index(value)
    except Exception:
        return None


def as_finite_float(value: Any) -> float | None:
    """Returns a finite number as a float, or None for anything else, including booleans."""
    if (
        isinstance(value, torch.Tensor | np.ndarray)
        and value.ndim == 0
        and value.dtype not in (torch.bool, np.bool_)
    ):
        value = value.item()
    if isinstance(value, bool | np.bool_) or not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except (OverflowError, ValueError):
        return None
    return number if math.isfinite(number) else None


def as_list(value: Any) -> list[Any] | None:
    """Returns the elements of a list, tuple, set, range, or one-dimensional array or tensor.

    Returns None for anything else, including text.
    """
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.tolist() if value.ndim == 1 else None
    if isinstance(value, str | bytes | bytearray) or not isinstance(value, Sequence | set | frozenset):
        return None
    return list(value)


def as_token_ids(value: Any) -> list[int] | None:
    """Returns token ids as a list of ints, or None if the value is not a sequence of integers."""
    items = as_list(value)
    if items is None or all(type(item) is int for item in items):
        return items
    integers = [as_int(item) for item in items]
    return None if None in integers else [n for n in integers if n is not None]
