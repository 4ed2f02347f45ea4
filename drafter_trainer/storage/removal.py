"""Removes directories in two moves, so that a killed process leaves no half of one under its name."""

from __future__ import annotations

import contextlib
import shutil
from pathlib import Path

_REMOVED = ".removed-"


def remove_directory(path: Path) -> None:
    """Removes a directory, if it exists: renames it first, so that it is whole or absent at any time."""
    doomed = path.with_name(_REMOVED + path.name)
    shutil.rmtree(doomed, ignore_errors=True)
    with contextlib.suppress(OSError):
        path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_removed(folder: Path) -> None:
    """Deletes what `remove_directory` has left in a folder because its process was killed."""
    for left in folder.glob(f"{_REMOVED}*"):
        shutil.rmtree(left, ignore_errors=True)
