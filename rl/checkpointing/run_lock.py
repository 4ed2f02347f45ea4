"""One writer a run: a lock on its directory that the kernel releases when its holder dies."""

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

_BEAT = 5.0  # seconds between two signs of life
_PATIENCE = 3 * _BEAT


class RunLock:
    """Holds ``lock`` in a run's directory, which says who writes there: host, process, since when, and a
    count that goes on.

    The kernel's lock (``flock``) ends with its holder, however that dies. Some network file systems keep such
    locks to one machine
    or have none: there, what another machine's process left counts as held while its count goes on.

    Args:
        run: The run's directory; is made.
        active: Whether this process is the one of its run that takes the lock: rank 0.
        patience: Seconds to watch another machine's count.
    """

    def __init__(self, run: Path, active: bool = True, patience: float = _PATIENCE) -> None:
        self._run, self._active, self._patience = run, active, patience
        self._path = run / "lock"
        self._file: int | None = None
        self._over = threading.Event()
        self._beats: threading.Thread | None = None

    def __enter__(self) -> RunLock:
        """Takes the lock.

        Raises:
            UserError: when another process has it, or the directory cannot be written.
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
                f"{self._run}: cannot be written ({error.strerror}); write another out=, or correct it"
            ) from None
        try:
            self._take()
        except BaseException:
            os.close(self._file)
            self._file = None
            raise
        self._me = {
            "host": socket.gethostname(),
            "boot": _boot(),
            "pid": os.getpid(),
            "born": _born(os.getpid()),
        }
        self._me["since"] = datetime.now(UTC).isoformat(timespec="seconds")
        self._beat(0)
        self._beats = threading.Thread(target=self._go_on, name="run-lock", daemon=True)
        self._beats.start()
        return self

    def _take(self) -> None:
        assert self._file is not None
        by_kernel = True
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise self._refusal(self._owner()) from None
        except OSError:  # a file system without locks
            by_kernel = False
        owner = self._owner()
        if owner is None:
            return
        if owner.get("boot") == _boot():  # this machine's kernel knows
            if not by_kernel and _born(owner.get("pid")) == owner.get("born"):
                raise self._refusal(owner)
            return
        end = time.monotonic() + self._patience
        while time.monotonic() < end:
            time.sleep(min(1.0, self._patience / 5))
            now = self._owner()
            if now is None:
                return
            if now.get("count") != owner.get("count"):
                raise self._refusal(now)

    def _owner(self) -> dict[str, Any] | None:
        """Who wrote last and has not let go; None where nobody has, or it cannot be read. The file is
        opened anew each time, so that a network file system asks its server.
        """
        try:
            found = json.loads(self._path.read_text(encoding="utf-8", errors="replace").rstrip("\0 \n"))
        except (OSError, ValueError):
            return None
        return found if isinstance(found, dict) else None

    def _refusal(self, owner: dict[str, Any] | None) -> UserError:
        who = "another process"
        if owner is not None:
            who = f"process {owner.get('pid')} on {owner.get('host')}, since {owner.get('since')}"
            with contextlib.suppress(OSError):
                who += f" (last sign of life {max(time.time() - self._path.stat().st_mtime, 0):.0f} s ago)"
        return UserError(f"{self._run} is being written by {who}: stop that run first, or write another out=")

    def _beat(self, count: int) -> None:
        assert self._file is not None
        # of one length: no rest of a longer text stays
        text = json.dumps({**self._me, "count": count}).ljust(300) + "\n"
        with contextlib.suppress(OSError):  # a full disk is reported where checkpoints and logs are written
            os.pwrite(self._file, text.encode(), 0)
            os.fsync(self._file)

    def _go_on(self) -> None:
        count = 0
        while not self._over.wait(_BEAT):
            count += 1
            self._beat(count)

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._file is None:
            return
        self._over.set()
        if self._beats is not None:
            self._beats.join()
        with contextlib.suppress(OSError):
            os.ftruncate(self._file, 0)  # nobody holds it; a removed file could be locked by two at once
        os.close(self._file)
        self._file = None


def _boot() -> str:
    """Tells running kernels apart, also those of machines that have one name."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return socket.gethostname()


def _born(pid: Any) -> str | None:
    """When a process of this machine began, in the kernel's ticks: numbers are used again. None where there
    is none.
    """
    try:
        return Path(f"/proc/{int(pid)}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, ValueError, TypeError, IndexError):
        return None
