"""Reads numbers and lists that users give (Python's, numpy's or torch's), and writes values and errors on one
line of a message.
"""

from __future__ import annotations

import math
import numbers
import operator
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

_SHOWN = 60


def shown(value: object) -> str:
    """A value in a message: one short line, whatever its ``repr`` does."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a broken object is still named
        text = f"a {type(value).__name__}"
    return text if len(text) <= _SHOWN else text[: _SHOWN - 3] + "..."


def error_line(error: Exception) -> str:
    """An error's type and the beginning of its message."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"


def whole_number(value: Any) -> int | None:
    """A whole number of Python, numpy or a torch tensor of one; None for anything else, booleans and 2.0
    among it.
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


def real_number(value: Any) -> float | None:
    """A finite number as a float; None for anything else, booleans among it."""
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


def listed(value: Any) -> list[Any] | None:
    """The elements of a list, tuple, set, range, or one-dimensional array or tensor; None for anything else,
    text among it.
    """
    if isinstance(value, torch.Tensor | np.ndarray):
        return value.tolist() if value.ndim == 1 else None
    if isinstance(value, str | bytes | bytearray) or not isinstance(value, Sequence | set | frozenset):
        return None
    return list(value)


def token_list(value: Any) -> list[int] | None:
    """Token ids as whole numbers; None where it is no list of such."""
    items = listed(value)
    if items is None or all(type(item) is int for item in items):
        return items
    numbers_ = [whole_number(item) for item in items]
    return None if None in numbers_ else [n for n in numbers_ if n is not None]
