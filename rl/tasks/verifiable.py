"""Scorers of problems that have one correct answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

from paceline.rl.tasks.answers import boxed, final_answer, normalized, without_markup

_COMMANDS = re.compile(r"\\(?:text|mathrm|mathbf|operatorname)\s*\{[^{}]*\}|\\[A-Za-z]+")
_MATHEMATICAL = (
    "sqrt|sin|cos|tan|cot|sec|csc|arcsin|arccos|arctan|sinh|cosh|tanh|log|exp|inf|infty|infinity|and|pi|mod|"
    "gcd|lcm|min|max|oo"
)
_PROSE = re.compile(rf"(?i)(?!(?:{_MATHEMATICAL})(?![a-z]))(?<![a-z])[^\W\d_]{{3,}}")
_OR = re.compile(r"(?i)\\text\{\s*or\s*\}|\bor\b")


def reasoning_gym_score(dataset: Any, entry: dict[str, Any]) -> Callable[[str], float]:
    """Returns a scorer that applies the data set's own scorer to the final answer.

    The answer is scored both as written and without markup, and the higher reward counts.

    Args:
        dataset: A reasoning-gym data set.
        entry: The data set's entry.

    Returns:
        A function from a completion to a reward in [0, 1]; 0 without a final answer.
    """

    def score(completion: str) -> float:
        answer = final_answer(completion)
        if answer is None:
            return 0.0
        return max(
            float(dataset.score_answer(answer=text, entry=entry))
            for text in {answer, without_markup(answer) or answer}
        )

    return score


def math_score(gold: str) -> Callable[[str], float]:
    """Returns a scorer that compares a completion with a reference answer.

    A marked final answer decides where it can be read. It is correct if it equals the reference up to markup,
    case and white space, or if math-verify finds it equal, as a formula or as a sentence with units or words.
    If it offers alternatives, all of them must be correct. Without a marked answer that can be read,
    math-verify reads the whole completion. A reference answer in words, such as a name, is compared only as
    text. The reference is parsed when the first completion is scored.

    Args:
        gold: Reference answer, as LaTeX or text.

    Returns:
        A function from a completion to 1.0 or 0.0.
    """
    reference = cache(lambda: _Reference(gold))
    return lambda completion: float(reference().equals(completion))


class _Reference:
    """A parsed reference answer."""

    def __init__(self, gold: str) -> None:
        self._text = normalized(gold)
        # math-verify would parse a word as the product of its letters
        self._formula = _sentence(gold) if _is_prose(gold) else _formula(without_markup(gold))

    def equals(self, completion: str) -> bool:
        """Whether a completion's answer equals the reference."""
        marked = final_answer(completion)
        answer = "" if marked is None else without_markup(marked)
        if self._text and normalized(answer or boxed(completion) or completion) == self._text:
            return True
        if not self._formula:
            return False
        if answer:
            verdict = self._judge(answer)
            if verdict is not None:
                return verdict
        return self._matches(_sentence(completion))

    def _judge(self, answer: str) -> bool | None:
        """Whether a marked answer is correct; None if it holds nothing that can be read."""
        from sympy import FiniteSet

        several = isinstance(self._formula[0], FiniteSet)
        alternatives = [part for part in map(without_markup, _OR.split(answer)) if part]
        if len(alternatives) > 1 and not several:
            verdicts = [self._judge(part) for part in alternatives]
            return None if set(verdicts) == {None} else False not in verdicts
        formula = [] if _is_prose(answer) else _formula(answer)
        if self._matches(formula):
            return True
        if formula and isinstance(formula[0], FiniteSet) and len(formula[0].args) > 1 and not several:
            return False  # several values, such as "18, 20", where one is expected
        sentence = _sentence(f"Answer: {answer}")
        if sentence:
            return self._matches(sentence)
        return False if formula and not isinstance(formula[0], str) else None

    def _matches(self, parsed: list[Any]) -> bool:
        """Whether math-verify finds a parsed answer equal to the reference."""
        from math_verify import verify

        return bool(parsed) and bool(verify(self._formula, parsed))


def _formula(text: str) -> list[Any]:
    """Parses a text as one formula with math-verify; the result holds strings where this fails."""
    from math_verify import parse

    return list(parse(f"${text}$"))


def _sentence(text: str) -> list[Any]:
    """Parses a text as words with formulas among them, with math-verify."""
    from math_verify import parse

    return list(parse(text))


def _is_prose(text: str) -> bool:
    """Whether a text contains a word that is not mathematical."""
    return _PROSE.search(_COMMANDS.sub(" ", text)) is not None


def verifiable_reward(
    prompts: list[Any], completions: list[str], problem: list[Any], **_: Any
) -> list[float]:
    """Scores each completion with its problem's own scorer, in TRL's reward-function signature.

    Args:
        prompts: Prompts, unused but part of the signature.
        completions: Texts of the completions.
        problem: The `paceline.rl.tasks.task.Problem` of each completion, as an extra column.

    Returns:
        One reward per completion.
    """
    return [p.score(text) for p, text in zip(problem, completions, strict=True)]
