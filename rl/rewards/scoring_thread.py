"""Threads that each keep a scoring process at work."""

from __future__ import annotations

import contextlib
import queue
import threading
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any

from paceline.rl.config.task import TaskConfig
from paceline.rl.rewards.process import Died, NotStarted, ScorerProcess, TookTooLong

_START_SECONDS = 600.0
_STARTS = 3  # in a row, after which a thread gives up
_IDLE_SECONDS = 1.0  # after which a thread without a job looks whether its process is still there


@dataclass(slots=True)
class Job:
    """Completions that are scored in one call: their places in the step, what is sent, and what will come of
    it.
    """

    number: int
    places: list[int]
    asked: dict[str, Any]
    answer: Future[dict[str, Any]] = field(default_factory=Future)


class ScoringThread(threading.Thread):
    """Takes jobs from a queue and has them scored by a process of its own, which it replaces when it ends.

    Args:
        config: The recipe's task section.
        seed: Of the task.
        jobs: The queue; None in it ends the thread.

    Attributes:
        up: Whether the process has started and not ended since.
        tried: Set once the first start has succeeded or failed.
        failure: Why the last start failed, or None.
    """

    def __init__(self, config: TaskConfig, seed: int, jobs: queue.SimpleQueue[Job | None]) -> None:
        super().__init__(daemon=True)
        self._config, self._seed, self._jobs = config, seed, jobs
        self._process: ScorerProcess | None = None
        self.tried = threading.Event()
        self.up = False
        self.failure: str | None = None
        self._failures = 0  # starts in a row
        self._closing = False
        self._job: Job | None = None
        self._switching = threading.Lock()

    def run(self) -> None:
        self._ensure()
        while not self._closing:
            try:
                job = self._jobs.get(timeout=_IDLE_SECONDS)
            except queue.Empty:
                self._ensure()  # one that was killed while it had nothing to do
                continue
            if job is None:
                break
            self._serve(job)
        self._drop()

    def abandon(self, job: Job) -> None:
        """Ends the process if it is still at this job."""
        with self._switching:
            if self._job is job and self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """Ends the process at once, and the thread soon."""
        self._closing = True
        process = self._process
        if process is not None:
            process.kill()
        self._jobs.put(None)

    def _serve(self, job: Job) -> None:
        with self._switching:
            self._job = job
        try:
            result: dict[str, Any] | Exception = self._ask(job)
        except Exception as error:
            result = error
        with self._switching:
            self._job = None
        with contextlib.suppress(InvalidStateError):  # it has been given up
            job.answer.set_exception(result) if isinstance(result, Exception) else job.answer.set_result(
                result
            )

    def _ask(self, job: Job) -> dict[str, Any]:
        limit = self._config.score_seconds * len(job.places)
        for _ in range(_STARTS):
            if job.answer.cancelled() or self._closing:
                break
            if self._ensure():
                assert self._process is not None
                try:
                    return self._process.ask(job.asked, limit)
                except (Died, TookTooLong) as error:
                    self._drop()
                    if not (isinstance(error, Died) and error.idle):
                        raise
        raise NotStarted(self.failure or "scoring processes end before they begin to score")

    def _ensure(self) -> bool:
        """Whether there is a process, started where there was none."""
        if self._process is not None and not self._process.alive:
            self._drop()
        if self._process is None and not self._closing and self._failures < _STARTS:
            try:
                self._process = ScorerProcess()
                if self._closing:  # since it was looked at
                    self._process.kill()
                self._process.set_up(self._config, self._seed, _START_SECONDS)
                self._failures, self.failure = 0, None
            except (NotStarted, OSError) as error:
                self._process = None
                self._failures, self.failure = self._failures + 1, str(error)
        self.up = self._process is not None
        self.tried.set()
        return self.up

    def _drop(self) -> None:
        self.up = False
        if self._process is not None:
            self._process.end()
            self._process = None
