"""Finds problems that a run is not trained on: held out, from a separate file, or newly created."""

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

_REASONING_GYM_SEED = 777  # rarely a run's seed; questions that a run trains on are left out anyway
_SOURCE_BY_SUFFIX: dict[str, Literal["jsonl", "parquet"]] = {
    ".jsonl": "jsonl",
    ".json": "jsonl",
    ".parquet": "parquet",
}


@dataclass(frozen=True, slots=True)
class EvaluationProblems:
    """Problems, and what a scoring process needs to find them.

    Attributes:
        problems: Problems to evaluate on.
        task: Task section from which they are built.
        seed: Seed with which `load_task` builds them.
        origin: Where they come from, for the user.
    """

    problems: list[Problem]
    task: TaskConfig
    seed: int
    origin: str


def evaluation_problems(config: RunConfig, count: int, trained: Task | None = None) -> EvaluationProblems:
    """Returns up to ``count`` problems that the recipe does not train on, the same in every call.

    They come from ``evaluation.path``, else from ``task.heldout``, else from reasoning-gym with another seed.

    Args:
        config: The recipe.
        count: Number of problems; a file or a held-out share may have fewer.
        trained: Task that the recipe trains on, if it is already loaded; its data is then not read again.

    Raises:
        UserError: If the data has no problems that are not trained on.
    """
    task = config.task
    if config.evaluation.path is not None:
        return _separate_problems(config, config.evaluation.path, count)
    if task.heldout:
        heldout = load_heldout_task(task, config.seed) if trained is None else trained.heldout()
        return EvaluationProblems(_first(heldout, count), task, config.seed, "held out (task.heldout)")
    if task.source != "reasoning_gym":
        raise UserError(
            f"task.path is {task.path}, and all of its problems are trained on; set task.heldout, for "
            "example 0.02, before the run, or name other problems in evaluation.path"
        )
    return _new_gym_problems(config, count, trained)


def _separate_problems(config: RunConfig, path: str, count: int) -> EvaluationProblems:
    """Returns problems from ``evaluation.path``.

    Raises:
        UserError: If these are trained on, or cannot be loaded.
    """
    task, split = config.task, config.evaluation.split or config.task.split
    file_source = _SOURCE_BY_SUFFIX.get(Path(path).suffix.lower())
    if (
        task.path is not None
        and Path(path).absolute() == Path(task.path).absolute()
        and (file_source or split == task.split)
    ):
        raise UserError(
            f"evaluation.path is {path}, which is trained on; name other problems, or another split in "
            "evaluation.split, or remove it and set task.heldout before the run"
        )
    separate = replace(
        task,
        source=file_source or "huggingface",
        path=path,
        split=split,
        heldout=0.0,
        curriculum=None,
        duplicates="keep",
    )
    problems = _first(load_task(separate, config.seed), count)
    return EvaluationProblems(problems, separate, config.seed, f"of {path}")


def _new_gym_problems(config: RunConfig, count: int, trained: Task | None) -> EvaluationProblems:
    """Returns problems that reasoning-gym creates with another seed, without questions that are trained on.

    Raises:
        UserError: If all new questions are trained on.
    """
    task = config.task
    trained_questions = {p.question for p in (trained or load_task(task, config.seed)).problems}
    larger = replace(task, size=2 * count + 16, curriculum=None)
    candidates = _first(load_task(larger, _REASONING_GYM_SEED), larger.size)
    problems = list(islice((p for p in candidates if p.question not in trained_questions), count))
    if not problems:
        raise UserError(
            f"task.size is {task.size}, and all of {larger.size} new problems are among those; write a "
            "smaller task.size"
        )
    origin = "created by reasoning-gym, none of them trained on"
    return EvaluationProblems(problems, larger, _REASONING_GYM_SEED, origin)


def fitting(candidates: EvaluationProblems, tokenizer: Any, config: RunConfig) -> EvaluationProblems:
    """Drops problems whose prompts do not fit in ``rollout.max_context``, and says so in ``origin``.

    Raises:
        UserError: If none fits.
    """
    limit = config.rollout.max_context
    fits = [p for p in candidates.problems if len(encode_problem(tokenizer, p, config.task)) < limit]
    if not fits:
        raise UserError(
            f"rollout.max_context is {limit}, but every evaluation prompt has at least that many tokens; "
            "raise it"
        )
    too_long = len(candidates.problems) - len(fits)
    note = f"; {too_long} more do not fit in rollout.max_context" if too_long else ""
    return replace(candidates, problems=fits, origin=candidates.origin + note)


def check_not_trained(config: RunConfig, trained: RunConfig) -> None:
    """Checks that an evaluation does not use problems that a run was trained on.

    Args:
        config: The recipe of the evaluation.
        trained: The recipe of the run.

    Raises:
        UserError: If the evaluation's held-out problems are not those that the run held out.
    """
    if config.evaluation.path is not None or config.task.source == "reasoning_gym":
        return
    for name in ("source", "path", "split", "subset", "heldout", "duplicates"):
        value, trained_value = getattr(config.task, name), getattr(trained.task, name)
        if value != trained_value:
            raise UserError(
                f"task.{name} is {value!r}, but the run was trained with {trained_value!r} and held out "
                "other problems; remove it, or name other problems in evaluation.path"
            )
    if config.seed != trained.seed:
        raise UserError(
            f"seed is {config.seed}, but the run was trained with {trained.seed}, which chose the held-out "
            "problems; remove it"
        )


def _first(task: Task, count: int) -> list[Problem]:
    """Returns the first problems of a task's first epoch, whose random order samples all of the data."""
    return task.batch(0, min(count, len(task.rows)))
