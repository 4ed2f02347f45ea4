"""The trainer's end of a scoring process: starts it, sends it jobs, and kills it with its children."""

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

_POLL_SECONDS = 0.2  # interval at which a silent process is checked for having ended
_MAX_REPLY_BYTES = 1 << 24  # bounds the trainer's memory, since the process is not trusted
_MAX_PRINTED_BYTES = 1 << 16  # of a process's output that is forwarded to the trainer's standard error


class ScorerNotStarted(Exception):
    """Says why a scoring process could not be started."""


class ScorerDied(Exception):
    """Says that a scoring process ended, or became unusable, while it had a job.

    Attributes:
        idle: Whether it had not started on the job. Then the job is not the cause, and another process can
            score it.
    """

    def __init__(self, message: str, idle: bool = False) -> None:
        super().__init__(message)
        self.idle = idle


class ScoringTimedOut(Exception):
    """Says that a scoring process did not reply within its time limit."""


class ScorerProcess:
    """Controls a process that runs `paceline.rl.rewards.worker`; it accepts jobs after `set_up`."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="paceline-scorer-", ignore_cleanup_errors=True)
        self._buffer = b""
        self._start()

    def set_up(self, config: TaskConfig, seed: int, seconds: float) -> None:
        """Sends the task to the process, and waits until it has loaded its data and rewards.

        Args:
            config: The recipe's task section.
            seed: Seed with which the task is built.
            seconds: Time limit in seconds.

        Raises:
            ScorerNotStarted: If this fails; the process has then been killed.
        """
        try:
            deadline = time.monotonic() + seconds
            self._send({"task": asdict(config), "seed": seed}, deadline)
            reply = self._receive(deadline)
        except (ScorerDied, ScoringTimedOut) as error:
            self.end()
            reason = error or f"no reply within {seconds:g} s"
            raise ScorerNotStarted(f"a scoring process did not start: {reason}") from None
        if "failed" in reply:
            self.end()
            raise ScorerNotStarted(str(reply["failed"]))

    def _start(self) -> None:
        """Starts the process, connected by two pipes."""
        child_requests, self._requests = os.pipe()
        self._replies, child_replies = os.pipe()
        os.set_blocking(self._requests, False)
        environment = {
            **os.environ,
            "TMPDIR": self._folder.name,
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
        }
        # -P keeps the current directory off the path, unless it is on this process's path
        command = [
            sys.executable,
            "-P",
            "-m",
            "paceline.rl.rewards.worker",
            str(child_requests),
            str(child_replies),
            str(os.getpid()),
        ]
        self._process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=(child_requests, child_replies),
            # Ctrl-C in a terminal must reach only the trainer, and `kill` ends the whole session
            start_new_session=True,
        )
        os.close(child_requests)
        os.close(child_replies)
        threading.Thread(target=_forward_output, args=(self._process.stdout,), daemon=True).start()

    @property
    def alive(self) -> bool:
        """Whether the process is running."""
        return self._process.poll() is None

    def score(self, job: dict[str, Any], seconds: float) -> dict[str, Any]:
        """Sends a job to the process, and waits for its reply.

        Args:
            job: Message that `paceline.rl.rewards.worker.Scorer.score_job` reads.
            seconds: Time limit in seconds, counted from when the process starts on the job.

        Raises:
            ScorerDied: If the process ends before it replies, sends an invalid reply, or does not start on
                the job.
            ScoringTimedOut: If the time limit passes.
        """
        deadline, started = time.monotonic() + seconds, False
        try:
            self._send(job, deadline)
            while True:
                reply = self._receive(deadline)
                if not started and reply.get("began") == job["job"]:
                    deadline, started = time.monotonic() + seconds, True
                elif reply.get("job") == job["job"]:
                    return reply
        except ScorerDied as error:
            raise ScorerDied(str(error), idle=not started) from None
        except ScoringTimedOut:
            if started:
                raise
            raise ScorerDied("the scorer's process did not start scoring", idle=True) from None

    def end(self) -> None:
        """Kills the process and its whole session, and frees its pipes and its temporary directory."""
        self.kill()
        self._process.wait()
        for pipe in (self._requests, self._replies):
            with contextlib.suppress(OSError):
                os.close(pipe)
        self._folder.cleanup()

    def kill(self) -> None:
        """Kills the process and its whole session; a thread that waits for a reply gets `ScorerDied`.

        May be called from any thread.
        """
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def _send(self, message: dict[str, Any], deadline: float) -> None:
        """Writes a message as one line of JSON, until ``deadline`` on the monotonic clock."""
        data = memoryview(json.dumps(message).encode() + b"\n")
        while data:
            self._wait([], [self._requests], deadline)
            try:
                data = data[os.write(self._requests, data) :]
            except BlockingIOError:
                continue
            except BrokenPipeError:
                raise ScorerDied(self._exit_description()) from None

    def _receive(self, deadline: float) -> dict[str, Any]:
        """Reads the next message, until ``deadline`` on the monotonic clock."""
        while b"\n" not in self._buffer:
            self._wait([self._replies], [], deadline)
            chunk = os.read(self._replies, 1 << 16)
            self._buffer += chunk
            if not chunk:
                raise ScorerDied(self._exit_description())
            if len(self._buffer) > _MAX_REPLY_BYTES:
                raise ScorerDied(f"the scorer's process sent a reply of more than {_MAX_REPLY_BYTES} bytes")
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            reply = json.loads(line)
        except ValueError:
            reply = None
        if not isinstance(reply, dict):
            raise ScorerDied("the scorer's process sent a reply that is not a JSON object")
        return reply

    def _wait(self, readable: list[int], writable: list[int], deadline: float) -> None:
        """Waits until a pipe can be read or written.

        Raises:
            ScorerDied: If the process has ended and its pipe is empty.
            ScoringTimedOut: If ``deadline`` on the monotonic clock passes.
        """
        while True:
            # checked before the pipe, so that a reply written just before the process ended is still read
            alive = self.alive
            can_read, can_write, _ = select.select(
                readable, writable, [], min(_POLL_SECONDS, max(deadline - time.monotonic(), 0.0))
            )
            if can_read or can_write:
                return
            if not alive:
                raise ScorerDied(self._exit_description())
            if time.monotonic() >= deadline:
                raise ScoringTimedOut

    def _exit_description(self) -> str:
        """Describes how the process ended."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)
        status = self._process.returncode
        if status is None:
            return "the scorer's process closed its pipe"
        how = f"by signal {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
        return f"the scorer's process ended {how}"


def _forward_output(output: Any) -> None:
    """Forwards a scoring process's output to standard error up to a limit, and drains the rest.

    Draining keeps the process from blocking on a full pipe.
    """
    left = _MAX_PRINTED_BYTES
    with contextlib.suppress(OSError, ValueError):
        while chunk := os.read(output.fileno(), 1 << 16):
            if left > 0:
                sys.stderr.write(chunk[:left].decode(errors="replace"))
                sys.stderr.flush()
                left -= len(chunk)
                if left <= 0:
                    sys.stderr.write(
                        f"\npaceline: a scorer printed {_MAX_PRINTED_BYTES >> 10} KiB; the rest is dropped\n"
                    )
    with contextlib.suppress(OSError):
        output.close()
