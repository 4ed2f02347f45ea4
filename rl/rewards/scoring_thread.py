"""Threads that each keep one scoring process busy."""

from __future__ import annotations

import contextlib
import queue
import threading
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from paceline.rl.config.task import TaskConfig
from paceline.rl.rewards.process import ScorerDied, ScorerNotStarted, ScorerProcess, ScoringTimedOut

_START_TIMEOUT_SECONDS = 600.0  # loading a large data set or a reward's model takes minutes
_MAX_FAILED_STARTS = 3  # consecutive; a reward that cannot be loaded would be retried forever
_IDLE_CHECK_SECONDS = 1.0  # interval at which an idle thread replaces a process that was killed


@dataclass(slots=True)
class Job:
    """Completions that are scored in one call.

    Attributes:
        number: Number of the job, unique within a pool.
        indices: Index in the step of each completion.
        request: Message that is sent to the scoring process.
        reply: Future of the reply.
    """

    number: int
    indices: list[int]
    request: dict[str, Any]
    reply: Future[dict[str, Any]] = field(default_factory=Future)


class ScoringThread(threading.Thread):
    """Takes jobs from a queue and has them scored by its own process, which it replaces when it ends.

    Args:
        config: The recipe's task section.
        seed: Seed with which the task is built.
        jobs: Queue of jobs; None in it ends the thread.

    Attributes:
        ready: Whether the process has started and is not known to have ended.
        start_attempted: Event that is set once the first start has succeeded or failed.
        failure: Why the last start failed, or None.
    """

    def __init__(self, config: TaskConfig, seed: int, jobs: queue.SimpleQueue[Job | None]) -> None:
        super().__init__(daemon=True)
        self._config, self._seed, self._jobs = config, seed, jobs
        self._process: ScorerProcess | None = None
        self.start_attempted = threading.Event()
        self.ready = False
        self.failure: str | None = None
        self._failed_starts = 0  # consecutive
        self._closing = False
        self._job: Job | None = None
        self._job_lock = threading.Lock()

    def run(self) -> None:
        """Serves jobs until `close` is called."""
        self._ensure_process()
        while not self._closing:
            try:
                job = self._jobs.get(timeout=_IDLE_CHECK_SECONDS)
            except queue.Empty:
                self._ensure_process()  # the process may have been killed while it was idle
                continue
            if job is None:
                break
            self._serve(job)
        self._end_process()

    def abandon(self, job: Job) -> None:
        """Kills the process if it is still scoring this job."""
        with self._job_lock:
            if self._job is job and self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """Kills the process at once, and lets the thread end."""
        self._closing = True
        process = self._process
        if process is not None:
            process.kill()
        self._jobs.put(None)

    def _serve(self, job: Job) -> None:
        """Scores a job, and sets its reply to the result or to the exception."""
        with self._job_lock:
            self._job = job
        try:
            result: dict[str, Any] | Exception = self._score(job)
        except Exception as error:
            result = error
        with self._job_lock:
            self._job = None
        with contextlib.suppress(InvalidStateError):  # the pool cancelled the job at its deadline
            if isinstance(result, Exception):
                job.reply.set_exception(result)
            else:
                job.reply.set_result(result)

    def _score(self, job: Job) -> dict[str, Any]:
        """Returns the reply to a job; retries with a new process if the old one died before starting it."""
        timeout = self._config.score_seconds * len(job.indices)
        for _ in range(_MAX_FAILED_STARTS):
            if job.reply.cancelled() or self._closing:
                break
            if self._ensure_process():
                assert self._process is not None
                try:
                    return self._process.score(job.request, timeout)
                except (ScorerDied, ScoringTimedOut) as error:
                    self._end_process()
                    if not (isinstance(error, ScorerDied) and error.idle):
                        raise
        raise ScorerNotStarted(self.failure or "scoring processes ended before they started to score")

    def _ensure_process(self) -> bool:
        """Starts a process if there is none, and returns whether there is one now."""
        if self._process is not None and not self._process.alive:
            self._end_process()
        if self._process is None and not self._closing and self._failed_starts < _MAX_FAILED_STARTS:
            try:
                self._process = ScorerProcess()
                if self._closing:  # `close` was called while the process was being created
                    self._process.kill()
                self._process.set_up(self._config, self._seed, _START_TIMEOUT_SECONDS)
                self._failed_starts, self.failure = 0, None
            except (ScorerNotStarted, OSError) as error:
                self._process = None
                self._failed_starts, self.failure = self._failed_starts + 1, str(error)
        self.ready = self._process is not None
        self.start_attempted.set()
        return self.ready

    def _end_process(self) -> None:
        """Kills the process, if there is one."""
        self.ready = False
        if self._process is not None:
            self._process.end()
            self._process = None
