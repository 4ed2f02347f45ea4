"""Rewards that a program can check."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rl.errors import UserError

_ANSWER = re.compile(r"Answer:[ \t]*(.*)")


def final_answer(completion: str) -> str | None:
    """The text after the last ``Answer:``, up to the end of its line; None when there is none or it is empty."""
    found = _ANSWER.findall(completion)
    return found[-1].strip() or None if found else None


def reasoning_gym_score(dataset: Any, entry: dict[str, Any]) -> Callable[[str], float]:
    """The data set's own scorer on the final answer: completion → reward in [0, 1], 0 without an answer."""

    def score(completion: str) -> float:
        answer = final_answer(completion)
        return 0.0 if answer is None else float(dataset.score_answer(answer=answer, entry=entry))

    return score


def math_score(gold: str) -> Callable[[str], float]:
    """Mathematical equality by math-verify: completion → 1.0 or 0.0. The final answer is read where one is marked, else the
    whole completion."""
    from math_verify import parse, verify

    parsed = parse(f"${gold}$")

    def score(completion: str) -> float:
        answer = final_answer(completion)
        if answer is not None and answer.split() == gold.split():  # also where math-verify reads nothing in it
            return 1.0
        return float(verify(parsed, parse(completion if answer is None else f"${answer}$")))

    return score


def load_reward(path: str) -> Callable[..., list[float]]:
    """A reward function of the user's, ``module:function``, looked up from the current directory too.

    It is called with ``prompts``, ``completions``, ``problem`` and ``answer``, lists of one length, by keyword, and returns as many
    numbers: TRL's reward signature.

    Raises:
        UserError: when there is no such module or function.
    """
    module, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"task.reward is {path!r}: {error}; write module:function") from None


def verifiable_reward(prompts: list[Any], completions: list[str], problem: list[Any], **_: Any) -> list[float]:
    """Reward of each completion by its problem's scorer, in TRL's reward-function signature.

    Args:
        prompts: Unused; part of the signature.
        completions: Texts.
        problem: The `rl.tasks.Problem` of each completion, as an extra column.
    """
    return [p.score(text) for p, text in zip(problem, completions, strict=True)]
