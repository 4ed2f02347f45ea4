"""Tries a recipe's reward on an example before anything is trained."""

from __future__ import annotations

from paceline.rl.config.task import TaskConfig
from paceline.rl.errors import UserError
from paceline.rl.rewards.pool import ScoringPool
from paceline.rl.tasks.problems import Problem

_IGNORANCE = "I do not know."


def score_example(problem: Problem, config: TaskConfig, seed: int, group_size: int) -> list[str]:
    """Scores made-up completions of a problem as a run would: one that ends in the reference answer, others
    without one.

    Args:
        problem: The first of the task.
        config: The recipe's task section.
        seed: Of the task.
        group_size: Samples of a prompt.

    Returns:
        What came of it, in lines of text.

    Raises:
        UserError: when a completion gets no score, or the reward is not found.
    """
    texts = [f"Answer: {problem.answer}", *[_IGNORANCE] * (group_size - 1)]
    with ScoringPool(config, seed, group_size) as pool:
        pool.wait_ready()
        for place, text in enumerate(texts):
            pool.add(place, problem, text, range(len(text)))
        scores = pool.collect()
    if scores.failed:
        raise UserError(
            f"task.reward: {scores.failed} of {len(texts)} made-up completions have no score: "
            f"{scores.problem}"
        )
    said = f"reward: to the first problem, {texts[0]!r:.60} scores {scores.values[0]:g}"
    said += f", {_IGNORANCE!r} {scores.values[1]:g}" if group_size > 1 else ""
    return [said, *(line for line in (pool.notice, scores.notice) if line is not None)]
