"""Things that several processes need and one of them makes, under a file lock, which the kernel releases when
its holder dies.
"""

from __future__ import annotations

import errno
import fcntl
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from paceline.rl.errors import UserError

_POLL = 0.2  # seconds
_NO_LOCKS = {
    errno.ENOLCK,
    errno.ENOSYS,
    errno.EOPNOTSUPP,
}  # of network file systems: work may then be done twice, and is kept once
_PATIENCE = 3.0  # seconds of waiting before it is said


def build_once(final: Path, make: Callable[[], object], say: Callable[[str], None] = print) -> Path:
    """Calls ``make`` where a directory is not there yet, in one process at a time.

    Args:
        final: The directory. ``make`` puts it there whole, by a rename, so that it may die at any time.
        make: Called by the first process; others wait for it, and find the directory.
        say: Gets a line when another process is waited for.

    Returns:
        ``final``.

    Raises:
        UserError: when the folder of ``final`` cannot be written.
    """
    if final.is_dir():
        return final
    with file_lock(final.with_name(f"{final.name}.lock"), say):
        if not final.is_dir():
            make()
    return final


@contextmanager
def file_lock(lock: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Runs the block while no other process is in one with the same lock file.

    Raises:
        UserError: when the file cannot be written.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a+")
    except OSError as error:
        raise UserError(
            f"{lock.parent}: cannot be written ({error.strerror}); set PACELINE_CACHE to a directory that can"
        ) from None
    with file:
        began, said = time.monotonic(), False
        while not _taken(file.fileno()):
            if not said and time.monotonic() - began > _PATIENCE:
                file.seek(0)
                say(
                    f"waiting for process {file.read().strip() or '?'}, which is making "
                    f"{lock.with_suffix('')}"
                )
                said = True
            time.sleep(_POLL)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def rename_into_place(building: Path, final: Path) -> None:
    """Renames a directory that is whole to where it is looked for, unless another process was faster."""
    try:
        building.rename(final)
    except OSError:
        if not final.is_dir():
            raise


def _taken(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return True
