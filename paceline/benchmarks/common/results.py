"""A benchmark's JSON file, written as its rows come: what is measured is not lost with the process that
measures it.
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from types import TracebackType
from typing import Any

from paceline.rl.errors import UserError
from paceline.rl.process.files import write_atomically

Keep = Callable[[Any], None]  # takes a finished row


def ignore(row: Any) -> None:
    """Keeps no row."""


def json_path(out: Path) -> Path:
    """The file of a benchmark's ``--out``, which is written with or without ``.json``."""
    return out if out.suffix == ".json" else out.with_name(f"{out.name}.json")


def check_target(out: Path) -> None:
    """Makes the folder of a benchmark's results, before anything is measured.

    Raises:
        UserError: where the results could not be written.
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
            f"--out {out}: {path} cannot be written ({error.strerror}); name another file"
        ) from None


class Results:
    """The tables of one benchmark, as a context. Each row is on disk once it is added.

    Until the context ends well the file says ``"unfinished": true``, and the results of an earlier run lie
    beside it as ``….before.json``.

    Args:
        out: The file, with or without ``.json``.
        command: What made it.
        **head: What else the file begins with; None takes the machine.
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

    def into(self, table: str) -> Keep:
        """Returns a function that adds a row to a table."""
        return lambda row: self.add(table, row)

    def add(self, table: str, row: Any) -> None:
        """Adds a row, a dataclass, to a table."""
        self._data.setdefault(table, []).append(asdict(row))
        self._write()

    def put(self, table: str, rows: Sequence[Any]) -> None:
        """Replaces a table's rows."""
        self._data[table] = [asdict(row) for row in rows]
        self._write()

    def note(self, **values: Any) -> None:
        """Adds single values."""
        self._data.update(values)
        self._write()

    def _write(self) -> bool:
        """Replaces the file in one instant, and tells whether it could. A full disk is said and does not end
        the measurement: the next row may find room.
        """
        try:
            if self._path.is_file() and "unfinished" not in json.loads(
                self._path.read_text(encoding="utf-8")
            ):
                self._path.replace(self._before)
        except (OSError, ValueError):
            pass  # nothing of an earlier run that could be kept
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
    """What a benchmark ran on."""
    import torch

    return {
        "cpu": platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
