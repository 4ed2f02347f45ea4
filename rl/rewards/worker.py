"""A scoring process: reads jobs from a pipe, one JSON object a line, scores them, and writes what came of it
to another.

Its answers are JSON, not pickles: what runs in here may evaluate completions, and must not be able to run
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
from paceline.rl.rewards.functions import Rewards, Score, load_rewards
from paceline.rl.rewards.sandbox import confine, limit_memory
from paceline.rl.tasks.task import Task, load_task

_DENIED = "; scorers may not use the network or write files: task.sandbox=off allows it"


class Scorer:
    """The task's problems and what scores their completions, in a process that is confined from here on.

    Args:
        config: The recipe's task section.
        seed: Of the task.
    """

    def __init__(self, config: TaskConfig, seed: int) -> None:
        self._task: Task = load_task(config, seed, check=False)  # the trainer has checked it
        functions = load_rewards(config)
        self._rewards = Rewards(functions) if functions else None
        if config.source != "reasoning_gym":
            import math_verify  # noqa: F401 - a second that the first completion would wait for
        self._confined = config.sandbox != "off"
        self._asked_network = False
        if self._confined:
            confine(Path(tempfile.gettempdir()))
            sys.addaudithook(self._notice)
        if config.score_memory is not None and sys.platform == "linux":
            limit_memory(config.score_memory)

    def _notice(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo":
            self._asked_network = True

    def answer(self, job: dict[str, Any]) -> dict[str, Any]:
        """Scores one job's completions: what is sent back."""
        begin = time.monotonic()
        parts: dict[str, list[float | None]] = {}
        self._asked_network = False
        try:
            scores, parts = self._score(job)
        # SystemExit and KeyboardInterrupt, too: it is one completion's or one group's
        except BaseException as error:
            scores = [self._reason(error)] * len(job["keys"])
        return {
            "job": job["job"],
            "scores": scores,
            "parts": parts,
            "span": [begin, time.monotonic()],
            "denied": self._asked_network,
        }

    def _score(self, job: dict[str, Any]) -> tuple[list[Score], dict[str, list[float | None]]]:
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

    def _reason(self, error: BaseException) -> str:
        chain: BaseException | None = error
        denied = False
        while chain is not None and self._confined and not denied:
            denied = isinstance(chain, PermissionError | socket.gaierror)
            chain = chain.__cause__ or chain.__context__
        try:
            message = " ".join(str(error).split())
        except Exception:  # an error of the error's own
            message = "which cannot say what it is"
        return f"the scorer failed ({type(error).__name__}: {message[:300]})" + (_DENIED if denied else "")


def main(requests: int, replies: int, parent: int) -> None:
    """Serves until the pipe of requests is closed or the trainer's process ends."""
    for pipe in (requests, replies):
        os.set_inheritable(pipe, False)  # what a scorer starts must not keep them open
    end_with_parent(parent)
    for number in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGUSR1,
    ):  # a terminal's or a cluster's, which the trainer answers
        signal.signal(number, lambda *_: None)  # not ignored: what a scorer starts would ignore them too
    # the pipes are gone when the trainer is, or when a scorer closed files that are not its own
    with contextlib.suppress(OSError), os.fdopen(requests, encoding="utf-8") as lines:
        setup = json.loads(lines.readline())
        try:
            scorer = Scorer(
                parse(TaskConfig, setup["task"], where="the recipe", prefix="task."), setup["seed"]
            )
        except (Exception, SystemExit) as error:
            said = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            _send(replies, {"failed": " ".join(said.split())})
            return
        _send(replies, {"ready": True})
        _serve(scorer, lines, replies)


def _serve(scorer: Scorer, lines: Any, replies: int) -> None:
    process, folder = os.getpid(), Path.cwd()
    for line in lines:
        job = json.loads(line)
        _send(replies, {"began": job["job"]})
        answer = scorer.answer(job)
        if os.getpid() != process:  # a child that a scorer forked and that came back from it
            os._exit(0)
        signal.setitimer(signal.ITIMER_REAL, 0)  # left by a scorer, it would end a later one
        with contextlib.suppress(OSError):
            os.chdir(folder)
        _send(replies, answer)


def _send(pipe: int, message: dict[str, Any]) -> None:
    data = json.dumps(message).encode() + b"\n"
    while data:
        data = data[os.write(pipe, data) :]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:4]))
