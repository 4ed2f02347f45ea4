"""Reading and writing a run's small files: whole or as before, and errors in one line."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paceline.drafter_trainer.storage import json_object
from paceline.drafter_trainer.storage.checksums import sync
from paceline.rl.errors import UserError

_DISK = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EIO,
    errno.ENOTDIR,
    errno.ESTALE,
    errno.EFBIG,
}


def write_atomically(path: Path, text: str) -> bool:
    """Replaces a file's content in one instant: a kill or a full disk leaves the old content.

    Returns:
        Whether anything was written; what has this content already is left alone.

    Raises:
        OSError: when the disk is full or not writable.
    """
    data = text.encode()
    with contextlib.suppress(OSError):
        if path.read_bytes() == data:
            return False
    building = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with building.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        building.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            building.unlink()
        raise
    sync(path.parent)
    return True


def append_line(path: Path, record: dict[str, Any]) -> None:
    """Adds a line of JSON, in one call, to the end of a file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        UserError: one line that names the file and what is wrong with it.
    """
    return json_object.read_object(path, UserError)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Reads a file with a JSON object of a step on each line.

    Returns:
        The objects that have a "step", and the number of lines that are something else.

    Raises:
        UserError: when the file is missing or cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    found = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and type(record.get("step")) is int:
                found.append(record)
    return found, len(lines) - len(found)


@contextlib.contextmanager
def disk_errors(run: Path) -> Iterator[None]:
    """Turns a full disk, a missing permission and the like into one line that says how to go on with a
    run.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK:
            raise
        place = error.filename or run
        raise UserError(
            f"{place}: {error.strerror}; free some disk or correct its permissions, then --resume {run}"
        ) from None
