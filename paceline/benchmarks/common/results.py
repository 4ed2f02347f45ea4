"""Writes a benchmark's JSON file row by row, so that a process that dies keeps what it has measured."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from paceline.rl.errors import UserError
from paceline.rl.process.files import write_atomically

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Log = Callable[[str], None]  # takes a line of progress
RowCallback = Callable[["DataclassInstance"], None]  # takes a row once it is measured


def ignore_row(row: DataclassInstance) -> None:
    """Discards a row: the default of functions that report rows as they are measured."""


def json_path(out: Path) -> Path:
    """Returns the JSON file that ``--out`` names, with or without the suffix ``.json``."""
    return out if out.suffix == ".json" else out.with_name(f"{out.name}.json")


def check_target(out: Path) -> None:
    """Creates the folder of a benchmark's results and checks that it is writable.

    Called before anything is measured.

    Raises:
        UserError: The results cannot be written there.
    """
    path = json_path(out)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir():
            raise IsADirectoryError(0, "is a directory")
        probe = path.with_name(f".{path.name}.{os.getpid()}")
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(
            f"--out {out}: {path} cannot be written ({error.strerror}); name a file in a writable folder"
        ) from None


class Results:
    """Holds the tables of one benchmark and, as a context manager, writes each row to disk once it is added.

    Until the context ends without an error the file says ``"unfinished": true``, and the results of an
    earlier run are kept beside it as ``….before.json``.

    Args:
        out: Target file, with or without ``.json``.
        command: Command line that makes the results; stored in the file.
        **head: Further values at the start of the file; by default the description of the machine.
    """

    def __init__(self, out: Path, command: str, **head: Any) -> None:
        self._path, self._before = json_path(out), json_path(out).with_suffix(".before.json")
        self._data: dict[str, Any] = {
            "command": command,
            "unfinished": True,
            **(head or {"machine": machine()}),
        }

    def __enter__(self) -> Results:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            del self._data["unfinished"]
            if self._write():
                self._before.unlink(missing_ok=True)

    def into(self, table: str) -> RowCallback:
        """Returns a function that adds a row to a table."""
        return lambda row: self.add(table, row)

    def add(self, table: str, row: DataclassInstance) -> None:
        """Adds a row to a table."""
        self._data.setdefault(table, []).append(asdict(row))
        self._write()

    def put(self, table: str, rows: Sequence[DataclassInstance]) -> None:
        """Replaces the rows of a table."""
        self._data[table] = [asdict(row) for row in rows]
        self._write()

    def note(self, **values: Any) -> None:
        """Adds values outside the tables."""
        self._data.update(values)
        self._write()

    def _write(self) -> bool:
        """Replaces the file atomically and returns whether that succeeded.

        A full disk is reported and does not end the measurement: writing the next row may succeed.
        """
        try:
            if self._path.is_file() and "unfinished" not in json.loads(
                self._path.read_text(encoding="utf-8")
            ):
                self._path.replace(self._before)
        except (OSError, ValueError):
            pass  # there is no readable earlier result to keep
        try:
            write_atomically(self._path, json.dumps(self._data, indent=1, ensure_ascii=False) + "\n")
            return True
        except OSError as error:
            print(
                f"{self._path}: not written ({error.strerror}); its rows are kept for the next attempt",
                flush=True,
            )
            return False


def machine() -> dict[str, Any]:
    """Returns the CPU, the number of threads and the torch version that a benchmark ran with."""
    import torch

    return {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
