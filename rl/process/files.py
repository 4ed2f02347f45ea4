"""Reads and writes a run's small files atomically, with errors in one line."""

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

_DISK_ERRORS = {  # what the user can fix: space, quota, permissions, the file system
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
    """Replaces a file's content atomically: after a kill or on a full disk the old content is still there.

    Args:
        path: File to write; it is created if necessary.
        text: New content, written as UTF-8.

    Returns:
        Whether the file was written; False if it has this content already.

    Raises:
        OSError: If the disk is full or not writable.
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
    """Appends a record to a file as one line of JSON, in a single write."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_object(path: Path) -> dict[str, Any]:
    """Reads a file that holds a JSON object.

    Raises:
        UserError: If the file is missing or not a JSON object; the message names it and the reason.
    """
    return json_object.read_object(path, UserError)


def read_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Reads a JSON Lines file that holds one object for each step.

    Returns:
        The objects with an integer "step", and the number of all other lines.

    Raises:
        UserError: If the file is missing or cannot be read.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}") from None
    records = []
    for line in lines:
        with contextlib.suppress(ValueError, RecursionError):
            record = json.loads(line)
            if isinstance(record, dict) and type(record.get("step")) is int:
                records.append(record)
    return records, len(lines) - len(records)


@contextlib.contextmanager
def disk_errors(run: Path) -> Iterator[None]:
    """Turns a full disk, missing permissions and the like into a `UserError` that says how to resume.

    Args:
        run: The run's directory.

    Raises:
        UserError: If the block raises an OSError that the user can fix.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in _DISK_ERRORS:
            raise
        place = error.filename or run
        raise UserError(
            f"{place}: {error.strerror}; free disk space or correct the permissions, then --resume {run}"
        ) from None
