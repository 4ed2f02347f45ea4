"""A JSONL file whose lines are found by their offsets and read when they are wanted."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from paceline.rl.errors import UserError

_CHUNK = 1 << 26  # bytes


class JsonlFile:
    """The lines of a file, blank ones left out. 16 bytes of memory a line.

    Args:
        path: Of the file, UTF-8, one JSON object a line.

    Attributes:
        name: The file's, without its ending.

    Raises:
        UserError: when there is no such file, or nothing in it.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"task.path {path}: there is no such file")
        self.name, self._path = path.stem, path
        self._file = path.open("rb")
        self._begins, self._ends = _lines(path)
        filled = _filled(path, self._begins, self._ends)
        self._numbers = np.arange(1, len(self._begins) + 1, dtype=np.int32)[filled]
        self._begins, self._ends = self._begins[filled], self._ends[filled]
        if not len(self._begins):
            raise UserError(f"{path}: no problems; write one JSON object with prompt and answer on each line")

    def __len__(self) -> int:
        return len(self._begins)

    def place(self, row: int) -> str:
        """Where a row stands, for messages."""
        return f"{self._path}:{self._numbers[row]}"

    def key(self, row: int) -> str:
        """A row's name across epochs."""
        return f"{self._path.name}/{self._numbers[row]}"

    def row_of(self, key: str) -> int | None:
        """The row of a `key`; None where there is none."""
        name, _, number = key.rpartition("/")
        if name != self._path.name or not number.isdigit():
            return None
        row = int(np.searchsorted(self._numbers, int(number)))
        return row if row < len(self) and self._numbers[row] == int(number) else None

    def entry(self, row: int) -> Any:
        """A row's JSON value.

        Raises:
            UserError: for a line that is not UTF-8 or not JSON.
        """
        begin = int(self._begins[row])
        raw = os.pread(self._file.fileno(), int(self._ends[row]) - begin, begin)
        try:
            return json.loads(raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.place(row)}: not UTF-8 (byte {error.start}): save the file as UTF-8"
            ) from None
        except json.JSONDecodeError as error:
            if row == 0 and raw.lstrip().startswith(b"["):
                raise UserError(
                    f"{self.place(row)}: one JSON list over several lines: write each object on a line"
                ) from None
            why = f"{error.msg} at column {error.colno}"
            raise UserError(f"{self.place(row)}: not JSON ({why}): is the line cut off?") from None
        except RecursionError:
            raise UserError(f"{self.place(row)}: JSON that is nested too deeply") from None

    def entries(self) -> Iterator[Any]:
        """All rows, in order."""
        return (self.entry(row) for row in range(len(self)))


def _lines(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """int64 [lines] each: where lines begin and end, the newline left out."""
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = [
            np.flatnonzero(np.frombuffer(file.read(_CHUNK), np.uint8) == ord("\n")) + begin
            for begin in range(0, size, _CHUNK)
        ]
    found = np.concatenate([*ends, [size]]) if ends else np.zeros(0, np.int64)
    return np.concatenate([[0], found[:-1] + 1])[: len(found)], found


def _filled(path: Path, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """bool [lines]: whether anything stands on a line. Nearly all begin with a brace; the others are looked
    at one by one.
    """
    filled = begins < ends
    if not filled.any():
        return filled
    data = np.memmap(path, np.uint8, "r")
    first = data[np.minimum(begins, len(data) - 1)]
    for line in np.flatnonzero(filled & (first != ord("{"))):
        filled[line] = bool(data[begins[line] : ends[line]].tobytes().strip())
    return filled
