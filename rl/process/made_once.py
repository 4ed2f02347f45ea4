"""Lets one of several processes create a file or directory that all of them need.

A file lock decides which process that is. The kernel releases it when its holder dies.
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

_POLL_SECONDS = 0.2
_QUIET_SECONDS = 3.0  # shorter waits are not reported
# A network file system without locks: two processes may then do the work, and the first result is kept.
_NO_LOCK_ERRORS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP}


def build_once(final: Path, make: Callable[[], object], say: Callable[[str], None] = print) -> Path:
    """Creates a directory unless it exists, in one process at a time.

    Args:
        final: The directory. It must come into being by a rename, so that ``make`` may die at any time.
        make: Function that creates it. The first process calls it; the others wait and use the result.
        say: Function that is called with a line if this process has to wait for another.

    Returns:
        ``final``.

    Raises:
        UserError: If the parent directory of ``final`` is not writable.
    """
    if final.is_dir():
        return final
    with file_lock(final.with_name(f"{final.name}.lock"), say):
        if not final.is_dir():
            make()
    return final


@contextmanager
def file_lock(lock: Path, say: Callable[[str], None] = print) -> Iterator[None]:
    """Runs the block while no other process holds the lock file.

    Args:
        lock: Path of the lock file; it is created if necessary.
        say: Function that is called with a line if this process has to wait for another.

    Raises:
        UserError: If the lock file is not writable.
    """
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("a+")
    except OSError as error:
        raise UserError(
            f"{lock.parent}: cannot be written ({error.strerror}); set PACELINE_CACHE to a directory that can"
        ) from None
    with file:
        began, reported = time.monotonic(), False
        while not _try_lock(file.fileno()):
            if not reported and time.monotonic() - began > _QUIET_SECONDS:
                file.seek(0)
                say(
                    f"waiting for process {file.read().strip() or '?'}, which is creating "
                    f"{lock.with_suffix('')}"
                )
                reported = True
            time.sleep(_POLL_SECONDS)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def rename_into_place(building: Path, final: Path) -> None:
    """Renames a finished directory to its final path; if another process was faster, its directory stays.

    Args:
        building: The finished directory.
        final: Its final path, on the same file system.

    Raises:
        OSError: If the rename fails and ``final`` does not exist.
    """
    try:
        building.rename(final)
    except OSError:
        if not final.is_dir():
            raise


def _try_lock(descriptor: int) -> bool:
    """Takes the lock without waiting; returns whether it is taken or the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCK_ERRORS:
            raise
    return True
