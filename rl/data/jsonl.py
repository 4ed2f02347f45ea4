"""Reads a JSONL file on demand, by the offsets of its lines."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from paceline.rl.errors import UserError

_CHUNK_BYTES = 1 << 26  # bounds the memory that finding line ends takes


class JsonlFile:
    """The non-blank lines of a file, which take 16 bytes of memory each.

    Args:
        path: UTF-8 file with one JSON object per line.

    Attributes:
        name: Name of the file without its suffix.

    Raises:
        UserError: If there is no such file, or it has only blank lines.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise UserError(f"task.path is {path}: no such file; write the path of a JSONL file")
        self.name, self._path = path.stem, path
        self._file = path.open("rb")
        self._begins, self._ends = _line_offsets(path)
        nonblank = _nonblank(path, self._begins, self._ends)
        self._numbers = np.arange(1, len(self._begins) + 1, dtype=np.int32)[nonblank]
        self._begins, self._ends = self._begins[nonblank], self._ends[nonblank]
        if not len(self._begins):
            raise UserError(f"{path}: no problems; write one JSON object with prompt and answer on each line")

    def __len__(self) -> int:
        return len(self._begins)

    def location(self, row: int) -> str:
        """Returns file and line of a row, for messages."""
        return f"{self._path}:{self._numbers[row]}"

    def key(self, row: int) -> str:
        """Returns the name of a row across epochs."""
        return f"{self._path.name}/{self._numbers[row]}"

    def row_of(self, key: str) -> int | None:
        """Returns the row with this `key`, or None if there is none."""
        name, _, number = key.rpartition("/")
        if name != self._path.name or not number.isdigit():
            return None
        row = int(np.searchsorted(self._numbers, int(number)))
        return row if row < len(self) and self._numbers[row] == int(number) else None

    def entry(self, row: int) -> Any:
        """Returns a row's JSON value.

        Raises:
            UserError: If the line is not UTF-8, or not JSON.
        """
        begin = int(self._begins[row])
        raw = os.pread(self._file.fileno(), int(self._ends[row]) - begin, begin)
        try:
            return json.loads(raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise UserError(
                f"{self.location(row)}: not UTF-8 (byte {error.start}); save the file as UTF-8"
            ) from None
        except json.JSONDecodeError as error:
            if row == 0 and raw.lstrip().startswith(b"["):
                raise UserError(
                    f"{self.location(row)}: one JSON list over several lines; write one object per line"
                ) from None
            reason = f"{error.msg} at column {error.colno}"
            raise UserError(f"{self.location(row)}: not JSON ({reason}); is the line cut off?") from None
        except RecursionError:
            raise UserError(f"{self.location(row)}: JSON is nested too deeply; flatten it") from None

    def entries(self) -> Iterator[Any]:
        """Yields all rows in order."""
        return (self.entry(row) for row in range(len(self)))


def _line_offsets(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """Returns the byte offsets of each line's begin and end, two int64 [lines]; newlines are excluded."""
    size = path.stat().st_size
    with path.open("rb") as file:
        ends = [
            np.flatnonzero(np.frombuffer(file.read(_CHUNK_BYTES), np.uint8) == ord("\n")) + begin
            for begin in range(0, size, _CHUNK_BYTES)
        ]
    line_ends = np.concatenate([*ends, [size]]) if ends else np.zeros(0, np.int64)
    return np.concatenate([[0], line_ends[:-1] + 1])[: len(line_ends)], line_ends


def _nonblank(path: Path, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Returns bool [lines], whether a line has any content.

    Nearly all lines begin with a brace; only the others are read.
    """
    nonblank = begins < ends
    if not nonblank.any():
        return nonblank
    data = np.memmap(path, np.uint8, "r")
    first_bytes = data[np.minimum(begins, len(data) - 1)]
    for line in np.flatnonzero(nonblank & (first_bytes != ord("{"))):
        nonblank[line] = bool(data[begins[line] : ends[line]].tobytes().strip())
    return nonblank
