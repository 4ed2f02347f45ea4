"""Locks a run's directory so that only one process writes to it."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import socket
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from typing import Any

from paceline.rl.errors import UserError

_HEARTBEAT_SECONDS = 5.0
_PATIENCE_SECONDS = 3 * _HEARTBEAT_SECONDS  # a holder without a heartbeat for this long counts as dead
_RECORD_LENGTH = 300  # characters; a fixed length leaves no rest of a longer record behind


class RunLock:
    """Holds the file ``lock`` in a run's directory. It is a context manager.

    The file records its holder's host, process and start, and a heartbeat count. The kernel releases the
    lock (``flock``) when its holder dies, however it dies. Some network file systems have no such locks or
    keep them to one machine; there, a lock of another machine's process is held while its count increases.

    Args:
        run: The run's directory; it is created if necessary.
        active: Whether this process takes the lock; only rank 0 does.
        patience: Seconds to watch the heartbeat of another machine's process.
    """

    def __init__(self, run: Path, active: bool = True, patience: float = _PATIENCE_SECONDS) -> None:
        self._run, self._active, self._patience = run, active, patience
        self._path = run / "lock"
        self._file: int | None = None
        self._released = threading.Event()
        self._heartbeat: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        """Takes the lock.

        Raises:
            UserError: If another process holds it, or the directory is not writable.
        """
        if not self._active:
            return self
        try:
            self._run.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except (FileExistsError, NotADirectoryError):
            raise UserError(
                f"out is {self._run}: a file is in the way; write out= and the name of a directory"
            ) from None
        except OSError as error:
            raise UserError(
                f"{self._run}: cannot be written ({error.strerror}); write another out=, or correct the "
                "permissions"
            ) from None
        try:
            self._acquire()
        except BaseException:
            os.close(self._file)
            self._file = None
            raise
        self._record = {
            "host": socket.gethostname(),
            "boot": _boot_id(),
            "pid": os.getpid(),
            "born": _start_ticks(os.getpid()),
        }
        self._record["since"] = datetime.now(UTC).isoformat(timespec="seconds")
        self._write(0)
        self._heartbeat = threading.Thread(target=self._keep_alive, name="run-lock", daemon=True)
        self._heartbeat.start()
        return self

    def _acquire(self) -> None:
        """Takes the kernel's lock and waits until the recorded holder, if any, is known to be dead.

        Raises:
            UserError: If the holder is alive.
        """
        assert self._file is not None
        has_locks = True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._held_error(self._holder()) from None
        except OSError:  # a file system without locks
            has_locks = False
        holder = self._holder()
        if holder is None:
            return
        if holder.get("boot") == _boot_id():  # a process of this machine: the kernel knows whether it lives
            if not has_locks and _start_ticks(holder.get("pid")) == holder.get("born"):
                raise self._held_error(holder)
            return
        end = time.monotonic() + self._patience
        while time.monotonic() < end:
            time.sleep(min(1.0, self._patience / 5))
            now = self._holder()
            if now is None:
                return
            if now.get("count") != holder.get("count"):
                raise self._held_error(now)

    def _holder(self) -> dict[str, Any] | None:
        """Returns the record of the process that has not released the lock; None if there is none.

        Opens the file each time, so that a network file system asks its server instead of its cache.
        """
        try:
            record = json.loads(self._path.read_text(encoding="utf-8", errors="replace").rstrip("\0 \n"))
        except (OSError, ValueError):
            return None
        return record if isinstance(record, dict) else None

    def _held_error(self, holder: dict[str, Any] | None) -> UserError:
        who = "another process"
        if holder is not None:
            who = f"process {holder.get('pid')} on {holder.get('host')}, since {holder.get('since')}"
            with contextlib.suppress(OSError):
                who += f" (last sign of life {max(time.time() - self._path.stat().st_mtime, 0):.0f} s ago)"
        return UserError(f"{self._run} is being written by {who}: stop that run first, or write another out=")

    def _write(self, count: int) -> None:
        assert self._file is not None
        text = json.dumps({**self._record, "count": count}).ljust(_RECORD_LENGTH) + "\n"
        with contextlib.suppress(OSError):  # a full disk is reported where checkpoints and logs are written
            os.pwrite(self._file, text.encode(), 0)
            os.fsync(self._file)

    def _keep_alive(self) -> None:
        count = 0
        while not self._released.wait(_HEARTBEAT_SECONDS):
            count += 1
            self._write(count)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        self._released.set()
        if self._heartbeat is not None:
            self._heartbeat.join()
        with contextlib.suppress(OSError):
            # empty means released; two processes could lock at once if the file were removed
            os.ftruncate(self._file, 0)
        os.close(self._file)
        self._file = None


def _boot_id() -> str:
    """Returns an id of the running kernel, which also differs between machines with the same host name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _start_ticks(pid: Any) -> str | None:
    """Returns when a process of this machine started, in kernel ticks; None if there is no such process.

    Together with the id it identifies a process, since the kernel reuses ids.
    """
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, ValueError, TypeError, IndexError):
        return None
