"""Tries a recipe's reward on an example before training starts."""

from __future__ import annotations

from paceline.rl.config.task import TaskConfig
from paceline.rl.errors import UserError
from paceline.rl.rewards.pool import ScoringPool
from paceline.rl.tasks.problems import Problem

_WRONG_COMPLETION = "I do not know."


def score_example(problem: Problem, config: TaskConfig, seed: int, group_size: int) -> list[str]:
    """Scores example completions as a run would: one ends in the reference answer, the others are wrong.

    Args:
        problem: First problem of the task.
        config: The recipe's task section.
        seed: Seed with which the task is built.
        group_size: Number of samples per prompt.

    Returns:
        A summary for the user, as lines of text.

    Raises:
        UserError: If a completion gets no score, or the reward cannot be loaded.
    """
    texts = [f"Answer: {problem.answer}", *[_WRONG_COMPLETION] * (group_size - 1)]
    with ScoringPool(config, seed, group_size) as pool:
        pool.wait_ready()
        for index, text in enumerate(texts):
            pool.add(index, problem, text, range(len(text)))
        scores = pool.collect()
    if scores.failed:
        raise UserError(
            f"task.reward gives no score to {scores.failed} of {len(texts)} example completions: "
            f"{scores.problem}"
        )
    summary = f"reward: for the first problem, {texts[0]!r:.60} scores {scores.values[0]:g}"
    summary += f", {_WRONG_COMPLETION!r} {scores.values[1]:g}" if group_size > 1 else ""
    return [summary, *(line for line in (pool.notice, scores.notice) if line is not None)]
