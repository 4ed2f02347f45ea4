"""Scoring process: reads jobs from a pipe, one JSON object per line, and writes their scores to another pipe.

Replies are JSON rather than pickles, because scorers may evaluate completions, which must not be able to run
code in the trainer.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from paceline.rl.config.parsing import parse
from paceline.rl.config.task import TaskConfig
from paceline.rl.errors import UserError
from paceline.rl.process.parent_death import end_with_parent
from paceline.rl.rewards.functions import Score, WeightedRewards, load_rewards
from paceline.rl.rewards.sandbox import confine, limit_memory
from paceline.rl.tasks.task import Task, load_task

_SANDBOX_HINT = "; the sandbox blocks the network and file writes: set task.sandbox=off to allow them"


class Scorer:
    """Loads the task's problems and reward functions, then confines the process and scores jobs.

    Args:
        config: The recipe's task section.
        seed: Seed with which the task is built.
    """

    def __init__(self, config: TaskConfig, seed: int) -> None:
        self._task: Task = load_task(config, seed, check=False)  # the trainer has checked every row
        functions = load_rewards(config)
        self._rewards = WeightedRewards(functions) if functions else None
        if config.source != "reasoning_gym":
            import math_verify  # noqa: F401 - takes a second, which would delay the first completion
        self._confined = config.sandbox != "off"
        self._tried_network = False
        if self._confined:
            confine(Path(tempfile.gettempdir()))
            sys.addaudithook(self._audit)
        if config.score_memory is not None and sys.platform == "linux":
            limit_memory(config.score_memory)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Records that a scorer looked up a host, as an audit hook."""
        if event == "socket.getaddrinfo":
            self._tried_network = True

    def score_job(self, job: dict[str, Any]) -> dict[str, Any]:
        """Scores the completions of one job.

        Returns:
            The reply to the trainer: the job's number, scores, values of each reward function, the interval
            on the monotonic clock, and whether a scorer tried to use the network.
        """
        begin = time.monotonic()
        parts: dict[str, list[float | None]] = {}
        self._tried_network = False
        try:
            scores, parts = self._score(job)
        # includes SystemExit and KeyboardInterrupt: whatever a scorer raises must cost only this job
        except BaseException as error:
            scores = [self._failure(error)] * len(job["keys"])
        return {
            "job": job["job"],
            "scores": scores,
            "parts": parts,
            "span": [begin, time.monotonic()],
            "denied": self._tried_network,
        }

    def _score(self, job: dict[str, Any]) -> tuple[list[Score], dict[str, list[float | None]]]:
        """Returns the score of each completion, and the values of each reward function by name."""
        problems = [self._task.find(key) for key in job["keys"]]
        if self._rewards is None:
            return [problem.score(text) for problem, text in zip(problems, job["texts"], strict=True)], {}
        names = {str(name) for problem in problems for name in problem.entry}
        columns: dict[str, list[Any]] = {
            name: [problem.entry.get(name) for problem in problems]
            for name in names - {"prompt", "completion"}
        }
        columns |= {
            "prompts": [problem.question for problem in problems],
            "completions": job["texts"],
            "completion_ids": job["ids"],
            "problem": problems,
            "answer": [problem.answer for problem in problems],
        }
        return self._rewards(len(problems), columns)

    def _failure(self, error: BaseException) -> str:
        """Returns the message of a job whose scorer raised, with a hint if the sandbox may be the reason."""
        chain: BaseException | None = error
        denied = False
        while chain is not None and self._confined and not denied:
            denied = isinstance(chain, PermissionError | socket.gaierror)
            chain = chain.__cause__ or chain.__context__
        try:
            message = " ".join(str(error).split())
        except Exception:  # the scorer's exception class may have a broken __str__
            message = "its message cannot be read"
        return f"the scorer failed ({type(error).__name__}: {message[:300]})" + (
            _SANDBOX_HINT if denied else ""
        )


def main(requests: int, replies: int, parent: int) -> None:
    """Serves jobs until the pipe of requests is closed or the trainer ends.

    Args:
        requests: File descriptor from which the setup and the jobs are read.
        replies: File descriptor to which replies are written.
        parent: Process id of the trainer.
    """
    for pipe in (requests, replies):
        os.set_inheritable(pipe, False)  # subprocesses of a scorer must not keep the pipes open
    end_with_parent(parent)
    # signals from a terminal or a cluster are handled by the trainer. A handler that does nothing, because
    # subprocesses of a scorer would inherit SIG_IGN
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda *_: None)
    # the pipes break when the trainer ends, or when a scorer closes file descriptors that are not its own
    with contextlib.suppress(OSError), os.fdopen(requests, encoding="utf-8") as lines:
        setup = json.loads(lines.readline())
        try:
            scorer = Scorer(
                parse(TaskConfig, setup["task"], where="the recipe", prefix="task."), setup["seed"]
            )
        except (Exception, SystemExit) as error:
            message = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            _send(replies, {"failed": " ".join(message.split())})
            return
        _send(replies, {"ready": True})
        _serve(scorer, lines, replies)


def _serve(scorer: Scorer, lines: Any, replies: int) -> None:
    """Scores the jobs that ``lines`` yields, and undoes what a scorer leaves behind in the process."""
    process_id, directory = os.getpid(), Path.cwd()
    for line in lines:
        job = json.loads(line)
        _send(replies, {"began": job["job"]})
        reply = scorer.score_job(job)
        if os.getpid() != process_id:  # a child that a scorer forked and that returned from the scorer
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, 0)  # an alarm left by this scorer would interrupt a later one
        with contextlib.suppress(OSError):
            os.chdir(directory)
        _send(replies, reply)


def _send(pipe: int, message: dict[str, Any]) -> None:
    """Writes a message as one line of JSON."""
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(pipe, data) :]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
