"""Scores in processes of their own, with time limits: what a scorer does wrong costs a reward, never the
step.
"""

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
from paceline.rl.rewards.process import Died, NotStarted, TookTooLong
from paceline.rl.rewards.sandbox import unconfined
from paceline.rl.rewards.scoring_thread import Job, ScoringThread
from paceline.rl.tasks.task import Problem

_TICK = 0.1
_DENIED = (
    "task.reward asks for the network, which scorers may not use: if it asks a judge, write "
    "task.sandbox=off; "
    "its scores may be what it makes of a judge that never answers"
)


@dataclass(slots=True)
class Scores:
    """What came of a step's completions.

    Attributes:
        values: The reward of each; ``task.score_failed`` where there is none.
        timeouts: Completions whose scoring took too long.
        errors: Completions whose scorer raised, died, or returned something else than finite numbers.
        problem: The first of these, in one line.
        busy: When something was being scored: begins and ends, seconds on the monotonic clock, one after the
            other.
        parts: By reward function, what each returned for each completion; None where it does not apply.
        asked: Completions that were to be scored.
        unscored: Those of them without a score, which have ``task.score_failed`` in ``values``.
        notice: Something else that the user should know, in one line.
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
        """Completions without a score."""
        return self.timeouts + self.errors

    def note(self, more: Scores) -> None:
        """Adds what was counted with other completions."""
        self.timeouts += more.timeouts
        self.errors += more.errors
        self.asked += more.asked
        self.problem, self.notice = self.problem or more.problem, self.notice or more.notice
        self.busy += more.busy
        for name, values in more.parts.items():
            self.parts.setdefault(name, []).extend(values)


class ScoringPool:
    """Completions go in as they end, and are scored while others are still decoded.

    The problems' own scorers get one completion at a time; reward functions of the user's get the samples of
    a prompt together, once the last of them has ended, so that they may compare them. Workers make the task
    anew from the recipe: a data set's scorer cannot be sent. A process that ends is replaced; the completions
        that it was scoring have no score, and an idle one loses none.

    Args:
        config: The recipe's task section.
        seed: Of the task.
        group_size: Samples of a prompt.

    Raises:
        UserError: when ``task.sandbox`` is ``require`` and this machine cannot confine scorers.
    """

    def __init__(self, config: TaskConfig, seed: int, group_size: int) -> None:
        self._config, self._group_size = config, group_size
        missing = [] if config.sandbox == "off" else unconfined()
        if missing and config.sandbox == "require":
            raise UserError(
                f"task.sandbox is require, but this machine cannot confine {', '.join(missing)}; write auto"
            )
        self.notice = (
            f"scorers are not confined in: {', '.join(missing)}; see docs/rewards.md" if missing else None
        )
        self._together = bool(reward_configs(config))
        self._queue: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._jobs: list[Job] = []
        self._numbers = 0
        self._groups: dict[int, list[tuple[int, Problem, str, Sequence[int]]]] = {}
        self._workers = [ScoringThread(config, seed, self._queue) for _ in range(config.score_workers)]
        for worker in self._workers:
            worker.start()

    def wait_ready(self) -> None:
        """Waits for the first scoring process.

        Raises:
            UserError: when none starts; it says why.
        """
        while not any(worker.up for worker in self._workers):
            if all(worker.tried.is_set() for worker in self._workers):
                raise UserError(
                    next((w.failure for w in self._workers if w.failure), "no scoring process starts")
                )
            self._workers[0].tried.wait(_TICK)

    def add(self, index: int, problem: Problem, text: str, token_ids: Sequence[int] = ()) -> None:
        """A completion has ended.

        Args:
            index: Its place in the step; the samples of a prompt are adjacent.
            problem: What it answers.
            text: Of the completion.
            token_ids: Of the completion, for reward functions that read them.
        """
        if not self._together:
            self._schedule([(index, problem, text, ())])
            return
        group = self._groups.setdefault(index // self._group_size, [])
        group.append((index, problem, text, token_ids))
        if len(group) == self._group_size:
            self._schedule(self._groups.pop(index // self._group_size))

    def _schedule(self, completions: Sequence[tuple[int, Problem, str, Sequence[int]]]) -> None:
        ordered = sorted(completions, key=lambda c: c[0])
        self._numbers += 1
        asked = {
            "job": self._numbers,
            "keys": [problem.key for _, problem, _, _ in ordered],
            "texts": [text for _, _, text, _ in ordered],
            "ids": [[int(token) for token in ids] for _, _, _, ids in ordered],
        }
        self._jobs.append(Job(self._numbers, [place for place, _, _, _ in ordered], asked))
        self._queue.put(self._jobs[-1])

    def collect(self) -> Scores:
        """Every score of the step; waits for what is missing, at most ``task.score_deadline`` seconds in
        which there is a process that scores.
        """
        for group in self._groups.values():  # those that lack a failed sample
            self._schedule(group)
        jobs, self._jobs, self._groups = self._jobs, [], {}
        self._wait(jobs)
        scores = Scores()
        for job in jobs:
            values = self._values(job, scores)
            scores.values.update(zip(job.places, values, strict=True))
        scores.busy = joined(scores.busy)
        return scores

    def _wait(self, jobs: Sequence[Job]) -> None:
        """Waits for the jobs, and gives up those that are not done in time."""
        pending, left = {job.answer for job in jobs}, self._config.score_deadline
        while pending and left > 0:
            begin = time.monotonic()
            pending = wait(pending, timeout=min(_TICK, left), return_when=FIRST_COMPLETED).not_done
            if any(worker.up for worker in self._workers):  # a start takes no time from those that wait
                left -= time.monotonic() - begin
        for job in jobs:
            if job.answer.cancel():
                for worker in self._workers:
                    worker.abandon(job)

    def _values(self, job: Job, scores: Scores) -> list[float]:
        """The rewards of a job's completions; what has none is counted."""
        count = len(job.places)
        scores.asked += count
        try:
            found = self._read(job.answer.result(timeout=0), count, scores)
        except (TookTooLong, CancelledError):
            limits = (
                f"{self._config.score_seconds:g} s a completion, or {self._config.score_deadline:g} s after "
                f"the rollouts"
            )
            scores.timeouts += count
            scores.problem = scores.problem or f"scoring took longer than {limits}"
            scores.unscored.update(job.places)
            return [self._config.score_failed] * count
        except (Died, NotStarted) as error:
            found = [str(error)] * count
        reasons = [score for score in found if isinstance(score, str)]
        scores.errors += len(reasons)
        scores.unscored.update(
            place for place, score in zip(job.places, found, strict=True) if isinstance(score, str)
        )
        if reasons and scores.problem is None:
            scores.problem = "".join(c for c in " ".join(reasons[0].split()) if c.isprintable())
        return [self._config.score_failed if isinstance(score, str) else score for score in found]

    def _read(self, answer: dict[str, Any], count: int, scores: Scores) -> list[Score]:
        """The scores in an answer. It comes from a process that is not trusted.

        Raises:
            Died: when it is none.
        """
        try:
            found: list[Score] = [s if isinstance(s, str) else float(s) for s in answer["scores"]]
            parts = {
                str(n): [None if v is None else float(v) for v in values]
                for n, values in answer["parts"].items()
            }
            begin, end = (float(moment) for moment in answer["span"])
        except (KeyError, TypeError, ValueError, AttributeError):
            found, parts, begin, end = [], {}, 0.0, 0.0
        if (
            len(found) != count
            or not all(isinstance(s, str) or math.isfinite(s) for s in found)
            or not begin <= end
        ):
            raise Died("the scorer's process answers with something else than scores")
        scores.busy.append((begin, end))
        for name, values in parts.items():
            scores.parts.setdefault(name, []).extend(values)
        if answer.get("denied"):
            scores.notice = _DENIED
        return found

    def __enter__(self) -> ScoringPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for worker in self._workers:
            worker.close()
        for worker in self._workers:
            worker.join(timeout=5.0)  # one that is about to start a process ends with this one


def joined(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Merges spans that overlap."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found
