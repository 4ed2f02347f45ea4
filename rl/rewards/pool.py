"""Scores completions in separate processes with time limits: a failing scorer costs a score, not the step."""

from __future__ import annotations

import math
import queue
import time
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, CancelledError, wait
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from paceline.rl.config.task import TaskConfig
from paceline.rl.errors import UserError
from paceline.rl.rewards.functions import Score, reward_configs
from paceline.rl.rewards.process import ScorerDied, ScorerNotStarted, ScoringTimedOut
from paceline.rl.rewards.sandbox import missing_confinement
from paceline.rl.rewards.scoring_thread import Job, ScoringThread
from paceline.rl.tasks.task import Problem

_POLL_SECONDS = 0.1
_NETWORK_BLOCKED = (
    "task.reward tried to use the network, which the sandbox blocks, so its scores may be those of a judge "
    "that never answers; set task.sandbox: off to allow it"
)


@dataclass(slots=True)
class Scores:
    """Holds the scores of a step's completions, and counts the failures.

    Attributes:
        values: Reward of each completion by its index in the step; ``task.score_failed`` for those without a
            score.
        timeouts: Number of completions whose scoring took too long.
        errors: Number of completions whose scorer raised, died, or returned something other than finite
            numbers.
        problem: First of these failures, in one line; None without failures.
        busy: Intervals in which a completion was being scored, as (begin, end) in seconds on the monotonic
            clock; sorted and disjoint.
        parts: Values that each reward function returned for each completion, by function name; None where the
            function does not apply.
        asked: Number of completions that were submitted for scoring.
        unscored: Indices of the completions without a score, which have ``task.score_failed`` in ``values``.
        notice: Another message for the user, in one line; None without one.
    """

    values: dict[int, float] = field(default_factory=dict)
    timeouts: int = 0
    errors: int = 0
    problem: str | None = None
    busy: list[tuple[float, float]] = field(default_factory=list)
    parts: dict[str, list[float | None]] = field(default_factory=dict)
    asked: int = 0
    unscored: set[int] = field(default_factory=set)
    notice: str | None = None

    @property
    def failed(self) -> int:
        """The number of completions without a score."""
        return self.timeouts + self.errors

    def note(self, other: Scores) -> None:
        """Adds the counts, intervals, parts and messages of other completions, but not their ``values``."""
        self.timeouts += other.timeouts
        self.errors += other.errors
        self.asked += other.asked
        self.problem, self.notice = self.problem or other.problem, self.notice or other.notice
        self.busy += other.busy
        for name, values in other.parts.items():
            self.parts.setdefault(name, []).extend(values)


class ScoringPool:
    """Scores completions as they finish, while others are still being decoded.

    The problems' own scorers get one completion at a time. The user's reward functions get all samples of a
    prompt together, once the last of them has finished, so that they can compare them. Workers rebuild the
    task from the recipe, because a data set's scorer cannot be sent to another process. A process that ends
    is replaced: the completions that it was scoring get no score, and an idle process loses nothing.

    Args:
        config: The recipe's task section.
        seed: Seed with which the task is built.
        group_size: Number of samples per prompt.

    Attributes:
        notice: Restrictions that this machine cannot enforce on scorers, in one line; None if there are none.

    Raises:
        UserError: If ``task.sandbox`` is ``require`` and this machine cannot confine scorers.
    """

    def __init__(self, config: TaskConfig, seed: int, group_size: int) -> None:
        self._config, self._group_size = config, group_size
        missing = [] if config.sandbox == "off" else missing_confinement()
        if missing and config.sandbox == "require":
            raise UserError(
                f"task.sandbox is require, but this machine cannot keep scorers from {', '.join(missing)}; "
                "write task.sandbox: auto"
            )
        self.notice = (
            f"task.sandbox: this machine cannot keep scorers from {', '.join(missing)}; see docs/rewards.md"
            if missing
            else None
        )
        self._by_group = bool(reward_configs(config))
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: list[Job] = []
        self._num_jobs = 0
        self._groups: dict[int, list[tuple[int, Problem, str, Sequence[int]]]] = {}
        self._workers = [ScoringThread(config, seed, self._queue) for _ in range(config.score_workers)]
        for worker in self._workers:
            worker.start()

    def wait_ready(self) -> None:
        """Waits until the first scoring process is ready.

        Raises:
            UserError: If no process could be started; the message says why.
        """
        while not any(worker.ready for worker in self._workers):
            if all(worker.start_attempted.is_set() for worker in self._workers):
                failures = (worker.failure for worker in self._workers if worker.failure)
                raise UserError(next(failures, "task.reward: no scoring process could be started"))
            self._workers[0].start_attempted.wait(_POLL_SECONDS)

    def add(self, index: int, problem: Problem, text: str, token_ids: Sequence[int] = ()) -> None:
        """Submits a finished completion for scoring.

        Args:
            index: Index of the completion in the step; the samples of a prompt are adjacent.
            problem: Problem that the completion answers.
            text: Text of the completion.
            token_ids: Token ids of the completion, for reward functions that read them.
        """
        if not self._by_group:
            self._schedule([(index, problem, text, ())])
            return
        group = self._groups.setdefault(index // self._group_size, [])
        group.append((index, problem, text, token_ids))
        if len(group) == self._group_size:
            self._schedule(self._groups.pop(index // self._group_size))

    def _schedule(self, completions: Sequence[tuple[int, Problem, str, Sequence[int]]]) -> None:
        """Queues a job that scores these completions, in the order of their indices."""
        ordered = sorted(completions, key=lambda completion: completion[0])
        self._num_jobs += 1
        request = {
            "job": self._num_jobs,
            "keys": [problem.key for _, problem, _, _ in ordered],
            "texts": [text for _, _, text, _ in ordered],
            "ids": [[int(token) for token in ids] for _, _, _, ids in ordered],
        }
        self._jobs.append(Job(self._num_jobs, [index for index, _, _, _ in ordered], request))
        self._queue.put(self._jobs[-1])

    def collect(self) -> Scores:
        """Returns the scores of all completions submitted since the last call, waiting for missing ones.

        Waits at most ``task.score_deadline`` seconds, not counting time in which no scoring process is ready.
        """
        for group in self._groups.values():  # groups left incomplete because a sample failed to decode
            self._schedule(group)
        jobs, self._jobs, self._groups = self._jobs, [], {}
        self._wait(jobs)
        scores = Scores()
        for job in jobs:
            values = self._values(job, scores)
            scores.values.update(zip(job.indices, values, strict=True))
        scores.busy = merge_spans(scores.busy)
        return scores

    def _wait(self, jobs: Sequence[Job]) -> None:
        """Waits for jobs until the deadline, then cancels those that are not done."""
        pending, seconds_left = {job.reply for job in jobs}, self._config.score_deadline
        while pending and seconds_left > 0:
            begin = time.monotonic()
            timeout = min(_POLL_SECONDS, seconds_left)
            pending = wait(pending, timeout=timeout, return_when=FIRST_COMPLETED).not_done
            # time in which every process is still starting does not count against the deadline
            if any(worker.ready for worker in self._workers):
                seconds_left -= time.monotonic() - begin
        for job in jobs:
            if job.reply.cancel():
                for worker in self._workers:
                    worker.abandon(job)

    def _values(self, job: Job, scores: Scores) -> list[float]:
        """Returns the rewards of a job's completions, and counts those without a score in ``scores``."""
        count = len(job.indices)
        scores.asked += count
        try:
            job_scores = self._read(job.reply.result(timeout=0), count, scores)
        except (ScoringTimedOut, CancelledError):
            scores.timeouts += count
            scores.problem = scores.problem or (
                f"scoring took longer than task.score_seconds ({self._config.score_seconds:g} s) per "
                f"completion or task.score_deadline ({self._config.score_deadline:g} s) after the rollouts"
            )
            scores.unscored.update(job.indices)
            return [self._config.score_failed] * count
        except (ScorerDied, ScorerNotStarted) as error:
            job_scores = [str(error)] * count
        failures = [score for score in job_scores if isinstance(score, str)]
        scores.errors += len(failures)
        scores.unscored.update(
            index for index, score in zip(job.indices, job_scores, strict=True) if isinstance(score, str)
        )
        if failures and scores.problem is None:
            scores.problem = "".join(c for c in " ".join(failures[0].split()) if c.isprintable())
        return [self._config.score_failed if isinstance(score, str) else score for score in job_scores]

    def _read(self, reply: dict[str, Any], count: int, scores: Scores) -> list[Score]:
        """Returns the scores in a reply, which comes from a process that is not trusted.

        Raises:
            ScorerDied: If the reply does not hold ``count`` valid scores.
        """
        try:
            job_scores: list[Score] = [s if isinstance(s, str) else float(s) for s in reply["scores"]]
            parts = {
                str(name): [None if value is None else float(value) for value in values]
                for name, values in reply["parts"].items()
            }
            begin, end = (float(moment) for moment in reply["span"])
        except (KeyError, TypeError, ValueError, AttributeError):
            job_scores, parts, begin, end = [], {}, 0.0, 0.0
        if (
            len(job_scores) != count
            or not all(isinstance(score, str) or math.isfinite(score) for score in job_scores)
            or not begin <= end
        ):
            raise ScorerDied("the scorer's process sent a reply without valid scores")
        scores.busy.append((begin, end))
        for name, values in parts.items():
            scores.parts.setdefault(name, []).extend(values)
        if reply.get("denied"):
            scores.notice = _NETWORK_BLOCKED
        return job_scores

    def __enter__(self) -> ScoringPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.close()
        for worker in self._workers:
            worker.join(timeout=5.0)  # a thread may still be starting a process, which ends with the trainer


def merge_spans(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Merges overlapping intervals, and returns them sorted."""
    merged: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if merged and begin <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(end, merged[-1][1]))
        else:
            merged.append((begin, end))
    return merged
