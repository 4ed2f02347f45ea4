"""The trainer's side of a scoring process: starts it, asks it, and ends it with everything that it
started.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import asdict
from typing import Any

from paceline.rl.config.task import TaskConfig

_TICK = 0.2  # seconds after which a process is looked at that says nothing
_LONGEST_ANSWER = 1 << 24  # bytes
_PRINTED = 1 << 16  # bytes of what a process prints that are passed on


class NotStarted(Exception):
    """A scoring process did not come up; the message says why."""


class Died(Exception):
    """A scoring process ended or became unusable while it scored.

    Attributes:
        idle: Whether it had not begun with the job. The job was not the reason then, and another process can
            be asked.
    """

    def __init__(self, message: str, idle: bool = False) -> None:
        super().__init__(message)
        self.idle = idle


class TookTooLong(Exception):
    """A scoring process did not answer within its time."""


class ScorerProcess:
    """A process that scores, see `paceline.rl.rewards.worker`; it can be asked once it is set up."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="paceline-scorer-", ignore_cleanup_errors=True)
        self._buffer = b""
        self._start()

    def set_up(self, config: TaskConfig, seed: int, seconds: float) -> None:
        """Waits until it has loaded its task and reward.

        Args:
            config: The recipe's task section.
            seed: Of the task.
            seconds: Longest that this may take.

        Raises:
            NotStarted: when it fails; the process has ended then.
        """
        try:
            until = time.monotonic() + seconds
            self._send({"task": asdict(config), "seed": seed}, until)
            said = self._receive(until)
        except (Died, TookTooLong) as error:
            self.end()
            raise NotStarted(
                f"a scoring process did not start: {error or f'nothing for {seconds:g} s'}"
            ) from None
        if "failed" in said:
            self.end()
            raise NotStarted(str(said["failed"]))

    def _start(self) -> None:
        theirs, self._requests = os.pipe()
        self._answers, theirs_too = os.pipe()
        os.set_blocking(self._requests, False)
        environment = {
            **os.environ,
            "TMPDIR": self._folder.name,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        # -P: the current directory is on the path only where it is on this process's
        command = [
            sys.executable,
            "-P",
            "-m",
            "paceline.rl.rewards.worker",
            str(theirs),
            str(theirs_too),
            str(os.getpid()),
        ]
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(theirs, theirs_too),
            # a terminal's Ctrl-C is the trainer's to answer; what it starts ends with it
            start_new_session=True,
        )
        os.close(theirs)
        os.close(theirs_too)
        threading.Thread(target=_pass_on, args=(self._process.stdout,), daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether the process runs."""
        return self._process.poll() is None

    def ask(self, job: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Has a job scored.

        Raises:
            Died: when the process ends before it answers, answers with what is no answer, or does not begin.
            TookTooLong: after ``seconds`` from when it began.
        """
        until, began = time.monotonic() + seconds, False
        try:
            self._send(job, until)
            while True:
                said = self._receive(until)
                if not began and said.get("began") == job["job"]:
                    until, began = time.monotonic() + seconds, True
                elif said.get("job") == job["job"]:
                    return said
        except Died as error:
            raise Died(str(error), idle=not began) from None
        except TookTooLong:
            if began:
                raise
            raise Died("the scorer's process does not begin to score", idle=True) from None

    def end(self) -> None:
        """Kills the process and all of its session, and frees what belonged to it."""
        self.kill()
        self._process.wait()
        for pipe in (self._requests, self._answers):
            with contextlib.suppress(OSError):
                os.close(pipe)
        self._folder.cleanup()

    def kill(self) -> None:
        """Kills the process and all of its session; from any thread: one that waits for an answer is told
        `Died`.
        """
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _send(self, message: dict[str, Any], until: float) -> None:
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            self._wait([], [self._requests], until)
            try:
                data = data[os.write(self._requests, data) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise Died(self._how_it_ended()) from None

    def _receive(self, until: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            self._wait([self._answers], [], until)
            read = os.read(self._answers, 1 << 16)
            self._buffer += read
            if not read:
                raise Died(self._how_it_ended())
            if len(self._buffer) > _LONGEST_ANSWER:
                raise Died("the scorer's process answers without end")
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            said = json.loads(line)
        except ValueError:
            said = None
        if not isinstance(said, dict):
            raise Died("the scorer's process answers with something else than JSON")
        return said

    def _wait(self, readable: list[int], writable: list[int], until: float) -> None:
        """Waits until a pipe can be used.

        Raises:
            Died: when the process has ended and left nothing to be read.
            TookTooLong: after ``until``.
        """
        while True:
            alive = self.alive  # looked up before the pipe: what was written before it ended is there
            can_read, can_write, _ = select.select(
                readable, writable, [], min(_TICK, max(until - time.monotonic(), 0.0))
            )
            if can_read or can_write:
                return
            if not alive:
                raise Died(self._how_it_ended())
            if time.monotonic() >= until:
                raise TookTooLong

    def _how_it_ended(self) -> str:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)
        status = self._process.returncode
        if status is None:
            return "the scorer's process closed its pipe"
        how = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return f"the scorer's process ended {how}"


def _pass_on(printed: Any) -> None:
    """Passes on what a scoring process prints, up to a limit, and reads the rest so that it need not wait."""
    left = _PRINTED
    with contextlib.suppress(OSError, ValueError):
        while part := os.read(printed.fileno(), 1 << 16):
            if left > 0:
                sys.stderr.write(part[:left].decode(errors="replace"))
                sys.stderr.flush()
                left -= len(part)
                if left <= 0:
                    sys.stderr.write("\npaceline: a scorer prints much; what else it prints is left out\n")
    with contextlib.suppress(OSError):
        printed.close()
