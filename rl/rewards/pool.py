"""Scores in processes of their own, with time limits: what a scorer does wrong costs a reward, never the step."""

from __future__ import annotations

import concurrent.futures
import math
import multiprocessing
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any

from pebble import ProcessPool

from rl.launchers import end_with_parent
from rl.rewards.verifiable import load_reward, verifiable_reward
from rl.task_config import TaskConfig
from rl.tasks import Problem, Task, load_task


@dataclass(slots=True)
class Scores:
    """What came of a step's completions.

    Attributes:
        values: The reward of each; ``task.score_failed`` where there is none.
        timeouts: Completions whose scoring took too long.
        errors: Completions whose scorer raised, died, or returned something else than finite numbers.
        problem: The first of these, in one line.
        busy: When something was being scored: begins and ends, by `time.monotonic`, one after the other.
    """

    values: dict[int, float] = field(default_factory=dict)
    timeouts: int = 0
    errors: int = 0
    problem: str | None = None
    busy: list[tuple[float, float]] = field(default_factory=list)

    def note(self, more: Scores) -> None:
        """Counts what went wrong with others too."""
        self.timeouts += more.timeouts
        self.errors += more.errors
        self.problem = self.problem or more.problem
        self.busy += more.busy


class ScoringPool:
    """Completions go in as they end, and are scored while others are still decoded.

    The problems' own scorers get one completion at a time; a reward function of the user's gets the samples of a prompt together,
    once the last of them has ended, so that it may compare them. Workers make the task anew from the recipe: a data set's scorer
    cannot be sent.

    Args:
        config: The recipe's task section.
        seed: Of the task.
        group_size: Samples of a prompt.
    """

    def __init__(self, config: TaskConfig, seed: int, group_size: int) -> None:
        self._config, self._group_size = config, group_size
        context: Any = multiprocessing.get_context("spawn")
        self._pool = ProcessPool(config.score_workers, initializer=_prepare, initargs=(config, seed), context=context)
        self._jobs: list[tuple[list[int], Any]] = []
        self._groups: dict[int, list[tuple[int, Problem, str]]] = {}

    def add(self, index: int, problem: Problem, text: str) -> None:
        """A completion has ended.

        Args:
            index: Its place in the step; the samples of a prompt are adjacent.
            problem: What it answers.
            text: Of the completion.
        """
        if self._config.reward is None:
            self._schedule([(index, problem, text)])
            return
        group = self._groups.setdefault(index // self._group_size, [])
        group.append((index, problem, text))
        if len(group) == self._group_size:
            self._schedule(self._groups.pop(index // self._group_size))

    def _schedule(self, completions: Sequence[tuple[int, Problem, str]]) -> None:
        ordered = sorted(completions, key=lambda c: c[0])
        keys, texts = [p.key for _, p, _ in ordered], [text for _, _, text in ordered]
        limit = self._config.score_seconds * len(ordered)
        self._jobs.append(([i for i, _, _ in ordered], self._pool.schedule(_score, args=(keys, texts), timeout=limit)))

    def collect(self) -> Scores:
        """Every score of the step; waits for what is missing, at most ``task.score_deadline`` seconds."""
        for group in self._groups.values():  # those that lack a failed sample
            self._schedule(group)
        jobs, self._jobs, self._groups = self._jobs, [], {}
        scores, end = Scores(), time.monotonic() + self._config.score_deadline
        for indices, job in jobs:
            values = self._result(job, max(end - time.monotonic(), 0.0), len(indices), scores)
            scores.values.update(zip(indices, values, strict=True))
        scores.busy = joined(scores.busy)
        return scores

    def _result(self, job: Any, wait: float, count: int, scores: Scores) -> list[float]:
        try:
            values, begin, end = job.result(timeout=wait)
            scores.busy.append((begin, end))
            if len(values) == count and all(math.isfinite(v) for v in values):
                return [float(v) for v in values]
            problem = f"scores are {values!r:.80}, not {count} finite numbers"
            scores.errors += count
        except concurrent.futures.TimeoutError:
            job.cancel()
            limits = f"{self._config.score_seconds:g} s a completion, or {self._config.score_deadline:g} s after the rollouts"
            problem = f"scoring took longer than {limits}"
            scores.timeouts += count
        except Exception as error:  # whatever a scorer does, also when it takes its process with it
            problem = f"the scorer failed ({type(error).__name__}: {error})"
            scores.errors += count
        scores.problem = scores.problem or " ".join(problem.split())
        return [self._config.score_failed] * count

    def __enter__(self) -> ScoringPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self._pool.stop()
        self._pool.join()


def joined(spans: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Spans that overlap as one."""
    found: list[tuple[float, float]] = []
    for begin, end in sorted(spans):
        if found and begin <= found[-1][1]:
            found[-1] = (found[-1][0], max(end, found[-1][1]))
        else:
            found.append((begin, end))
    return found


_task: Task | None = None  # of a worker
_reward: Any = verifiable_reward


def _prepare(config: TaskConfig, seed: int) -> None:
    global _task, _reward
    end_with_parent()
    for number in (signal.SIGINT, signal.SIGUSR1):  # a terminal's or a cluster's, which the trainer answers
        signal.signal(number, signal.SIG_IGN)
    _task = load_task(config, seed, check=False)  # the trainer has checked it
    if config.reward is not None:
        _reward = load_reward(config.reward)


def _score(keys: list[str], texts: list[str]) -> tuple[list[float], float, float]:
    """Scores, and from when to when they were computed."""
    begin = time.monotonic()
    assert _task is not None
    asked = [_task.find(key) for key in keys]
    scores = _reward(prompts=[p.question for p in asked], completions=texts, problem=asked, answer=[p.answer for p in asked])
    return [float(s) for s in scores], begin, time.monotonic()
