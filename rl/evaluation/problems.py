"""Problems that a run is not trained on: held out, from a file of their own, or made by reasoning-gym with
another seed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from paceline.rl.config.run import RunConfig
from paceline.rl.config.task import TaskConfig
from paceline.rl.errors import UserError
from paceline.rl.tasks.problems import Problem
from paceline.rl.tasks.prompts import encode_problem
from paceline.rl.tasks.task import Task, load_heldout_task, load_task

_SEED = 777  # of reasoning-gym's problems for evaluation
_SUFFIXES: dict[str, Literal["jsonl", "parquet"]] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}


@dataclass(frozen=True, slots=True)
class EvaluationProblems:
    """Problems with what a scoring process needs to find them.

    Attributes:
        problems: What is asked.
        task: The task section that they come from.
        seed: The seed that `load_task` makes them with.
        origin: Where they come from, in words.
    """

    problems: list[Problem]
    task: TaskConfig
    seed: int
    origin: str


def evaluation_problems(config: RunConfig, count: int, trained: Task | None = None) -> EvaluationProblems:
    """Returns up to ``count`` problems that the recipe does not train on, the same in every call.

    Args:
        config: The recipe. ``evaluation.path`` comes first, then ``task.heldout``; reasoning-gym makes
            others.
        count: How many are wanted; a file or a held-out share may have fewer.
        trained: What the recipe trains on, where it is loaded already; its data is not read again.

    Raises:
        UserError: when the data has no problems that are not trained on.
    """
    task, own = config.task, config.evaluation.path
    if own is not None:
        known = _SUFFIXES.get(Path(own).suffix.lower())
        split = config.evaluation.split or task.split
        if (
            task.path is not None
            and Path(own).absolute() == Path(task.path).absolute()
            and (known or split == task.split)
        ):
            raise UserError(
                f"evaluation.path is {own}, which is trained on: name other problems, another split in "
                "evaluation.split, or write "
                "task.heldout before the run, and no evaluation.path"
            )
        asked = replace(
            task,
            source=known or "huggingface",
            path=own,
            split=split,
            heldout=0.0,
            curriculum=None,
            duplicates="keep",
        )
        return EvaluationProblems(
            _first(load_task(asked, config.seed), count), asked, config.seed, f"of {own}"
        )
    if task.heldout:
        heldout = load_heldout_task(task, config.seed) if trained is None else trained.heldout()
        return EvaluationProblems(_first(heldout, count), task, config.seed, "held out (task.heldout)")
    if task.source != "reasoning_gym":
        raise UserError(
            f"task.path {task.path}: all of its problems are trained on; write task.heldout, for example "
            "0.02, before the run, "
            "or name other problems in evaluation.path"
        )
    asked_in_training = {problem.question for problem in (trained or load_task(task, config.seed)).problems}
    made = replace(task, size=2 * count + 16, curriculum=None)
    fresh = (p for p in _first(load_task(made, _SEED), made.size) if p.question not in asked_in_training)
    problems = list(islice(fresh, count))
    if not problems:
        raise UserError(
            f"task.datasets: all of {made.size} new problems are among the {task.size} trained on; write a "
            "smaller task.size"
        )
    return EvaluationProblems(problems, made, _SEED, "made by reasoning-gym, none of them trained on")


def fitting(asked: EvaluationProblems, tokenizer: Any, config: RunConfig) -> EvaluationProblems:
    """Leaves out problems whose prompts have no room in ``rollout.max_context``, and counts them in
    ``origin``.

    Raises:
        UserError: when none fits.
    """
    limit = config.rollout.max_context
    fits = [p for p in asked.problems if len(encode_problem(tokenizer, p, config.task)) < limit]
    if not fits:
        raise UserError(
            f"evaluation: every prompt has rollout.max_context ({limit}) tokens or more: raise it"
        )
    long = len(asked.problems) - len(fits)
    said = f"; {long} others are longer than rollout.max_context" if long else ""
    return replace(asked, problems=fits, origin=asked.origin + said)


def check_not_trained(config: RunConfig, trained: RunConfig) -> None:
    """Refuses to evaluate a run on what it was trained on.

    Args:
        config: The recipe of the evaluation.
        trained: The recipe of the run.

    Raises:
        UserError: when its held-out problems are not those that the run held out.
    """
    if config.evaluation.path is not None or config.task.source == "reasoning_gym":
        return
    for name in ("source", "path", "split", "subset", "heldout", "duplicates"):
        asked, was = getattr(config.task, name), getattr(trained.task, name)
        if asked != was:
            raise UserError(
                f"task.{name} is {asked!r}, the run's was {was!r}: what it held out is another part of the "
                "data; leave it out, or "
                "name other problems in evaluation.path"
            )
    if config.seed != trained.seed:
        raise UserError(
            f"seed is {config.seed}, the run's was {trained.seed}, which chose what is held out: leave it out"
        )


def _first(task: Task, count: int) -> list[Problem]:
    """Returns the first problems of a task's first epoch, whose order takes them from all over the data."""
    return task.batch(0, min(count, len(task.rows)))
