"""Verifiable problems: reasoning-gym data sets by name, or a JSONL of prompts and answers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rl.errors import UserError
from rl.rewards.verifiable import math_score, reasoning_gym_score
from rl.task_config import TaskConfig


@dataclass(frozen=True, slots=True)
class Problem:
    """A question with its scorer.

    Attributes:
        key: Names the problem across epochs: the samples of one key share drafts.
        question: What is asked, instruction included.
        answer: The reference answer.
        score: Completion text → reward.
        entry: The data set's own record.
        dataset: Name of the data set.
        difficulty: For a curriculum, on the recipe's own scale.
    """

    key: str
    question: str
    answer: str
    score: Callable[[str], float]
    entry: dict[str, Any]
    dataset: str
    difficulty: float = 0.0


class Task:
    """A fixed list of problems, drawn in epochs.

    Args:
        problems: At least one.
        seed: Of the order.
    """

    def __init__(self, problems: Sequence[Problem], seed: int) -> None:
        self.problems = list(problems)
        self._seed = seed

    def batch(self, step: int, count: int) -> list[Problem]:
        """The ``count`` problems of step ``step``: a function of (seed, step), so that a resumed run goes on in the same order."""
        return [self._at(step * count + i) for i in range(count)]

    def _at(self, position: int) -> Problem:
        epoch, offset = divmod(position, len(self.problems))
        order = list(range(len(self.problems)))
        random.Random(f"{self._seed}/{epoch}").shuffle(order)
        return self.problems[order[offset]]


def load_task(config: TaskConfig, seed: int) -> Task:
    """Builds the task of a recipe.

    Raises:
        UserError: unknown data set, bad parameters, or a bad line of the JSONL, named by its number.
    """
    if config.source == "jsonl":
        assert config.path is not None
        return Task(_read_jsonl(Path(config.path), config.instruction), seed)
    return Task(reasoning_gym_problems(config, config.size, seed), seed)


def reasoning_gym_problems(config: TaskConfig, count: int, seed: int) -> list[Problem]:
    """``count`` problems of the mixture, the data sets' shares by weight."""
    total = sum(d.weight for d in config.datasets)
    problems: list[Problem] = []
    for order, dataset in enumerate(config.datasets):
        last = order == len(config.datasets) - 1
        share = count - len(problems) if last else round(count * dataset.weight / total)
        source = _create_dataset(dataset.name, share, seed + 7919 * order, dataset.params)
        for index in range(share):
            entry = source[index]
            question = entry["question"] + (" " + config.instruction if config.instruction else "")
            score = reasoning_gym_score(source, entry)
            key, answer = f"{order}/{index}", str(entry["answer"])
            problems.append(Problem(key, question, answer, score, entry, dataset.name, dataset.difficulty))
    return problems


def _create_dataset(name: str, size: int, seed: int, params: dict[str, Any]) -> Any:
    import difflib

    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, n=1, cutoff=0.0)[0]
        raise UserError(f"task.datasets names {name!r}, which reasoning-gym does not have; did you mean {close}?")
    try:
        return reasoning_gym.create_dataset(name, size=max(size, 1), seed=seed, **params)
    except (TypeError, AssertionError, ValueError) as error:
        raise UserError(f"task.datasets {name}: reasoning-gym refuses the parameters {params}: {error}") from None


def _read_jsonl(path: Path, instruction: str) -> list[Problem]:
    if not path.is_file():
        raise UserError(f"task.path {path}: there is no such file")
    problems = []
    with path.open("rb") as lines:
        for number, raw in enumerate(lines, start=1):
            if raw.strip():
                problems.append(_jsonl_problem(path, number, raw, instruction))
    if not problems:
        raise UserError(f"{path}: no problems; write one JSON object with prompt and answer on each line")
    return problems


def _jsonl_problem(path: Path, number: int, raw: bytes, instruction: str) -> Problem:
    try:
        entry = json.loads(raw.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(f"{path}:{number}: not UTF-8 (byte {error.start}): save the file as UTF-8") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno}): is the line cut off?") from None
    missing = [k for k in ("prompt", "answer") if not isinstance(entry, dict) or k not in entry]
    if missing:
        raise UserError(f'{path}:{number}: no {" and no ".join(missing)}; write {{"prompt": ..., "answer": ...}}')
    question = str(entry["prompt"]) + (" " + instruction if instruction else "")
    answer = str(entry["answer"])
    difficulty = entry.get("difficulty", 0.0)
    if isinstance(difficulty, bool) or not isinstance(difficulty, int | float):
        raise UserError(f"{path}:{number}: difficulty is {difficulty!r}; write a number, or leave it out")
    return Problem(f"{path.name}/{number}", question, answer, math_score(answer), entry, path.stem, float(difficulty))
