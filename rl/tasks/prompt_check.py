"""What there is to say about a task's prompts before the first step: whether the template takes them, and
whether they fit.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from paceline.rl.config.run import RunConfig
from paceline.rl.errors import UserError
from paceline.rl.models.hub import hub_answers
from paceline.rl.models.policies import cached_policy
from paceline.rl.tasks.problems import Problem
from paceline.rl.tasks.prompts import encode_problem
from paceline.rl.tasks.row_problems import RowProblems
from paceline.rl.tasks.task import Task

# up to so many prompts are all encoded before the first step; of more, a sample is, and the others when
# chosen
_TRIED = 4096
_SAMPLE = 1024
_SHAPES = 64
_FEWEST = 0.05  # share of prompts that must fit where most are tried only when they are chosen


def check_prompts(task: Task, config: RunConfig, tokenizer: Any) -> list[str]:
    """Tries the chat template, leaves prompts out that have no room in ``rollout.max_context``, and counts
    what is left.

    Prompts are measured exactly where few are long enough to matter, going by their bytes; otherwise a sample
    is, and each of the others when it is chosen, so that the start does not wait for a large data set. Either
    way every rank leaves out the same.

    Returns:
        Lines for the user.

    Raises:
        UserError: when the template refuses what the data or the recipe asks for, when no prompt is left, or
            fewer than ``rollout.prompts_per_step``.
    """
    lines = [*task.notes, *_try_template(task, config, tokenizer), *make_room(task, config, tokenizer)]
    check_count(task, config, lines)
    return lines


def check_count(task: Task, config: RunConfig, lines: Sequence[str]) -> None:
    """Refuses a step that would have to repeat a prompt.

    Args:
        task: Without the problems that are left out.
        config: The recipe.
        lines: What the user has been told of the task; the error repeats it.

    Raises:
        UserError: where there are fewer problems than prompts in a step.
    """
    wanted, there = config.rollout.prompts_per_step, len(task.rows)
    if there < wanted:
        raise UserError(
            f"task: {there} problems to ask are fewer than rollout.prompts_per_step ({wanted}), so a step "
            "would repeat a prompt: "
            f"write at most {there}, or add problems{''.join(f' ({line})' for line in lines)}"
        )


def check_recipe(task: Task, config: RunConfig) -> list[str]:
    """Runs `check_prompts` without loading the policy. Where not even its tokenizer can be had, problems are
    counted alone.

    Raises:
        UserError: as `check_prompts`.
    """
    tokenizer = _tokenizer(config.policy.model)
    if tokenizer is None:
        check_count(task, config, task.notes)
        return [
            *task.notes,
            f"{config.policy.model}: no tokenizer at hand: prompts were neither put into a template nor "
            "measured",
        ]
    return check_prompts(task, config, tokenizer)


def _tokenizer(model: str) -> Any:
    """A policy's tokenizer, from where the policy lies or from the hub; None where it cannot be had, which is
    said elsewhere.
    """
    path = cached_policy(model)
    try:
        return AutoTokenizer.from_pretrained(
            model if path is None else path, local_files_only=path is not None or not hub_answers()
        )
    except Exception:  # no such model, a gated one, no tokenizer in it
        return None


def _try_template(task: Task, config: RunConfig, tokenizer: Any) -> list[str]:
    """Encodes the first problem of each sequence of roles."""
    template = getattr(tokenizer, "chat_template", None)
    kwargs = config.task.chat_template_kwargs
    if template is None and kwargs:
        raise UserError(
            f"task.chat_template_kwargs sets {', '.join(kwargs)}, and the policy's tokenizer has no chat "
            "template"
        )
    for name in kwargs if template is not None else ():
        if not re.search(rf"\b{re.escape(name)}\b", str(template)):
            raise UserError(
                f"task.chat_template_kwargs sets {name}, which the policy's chat template does not read: "
                "leave it out"
            )
    for problem in _examples(task):
        try:
            ids = encode_problem(tokenizer, problem, config.task)
        except UserError as error:
            raise UserError(f"{error} (tried with {problem.key})") from None
        system = next(
            (t["content"] for t in problem.messages or () if t["role"] == "system"), config.task.system
        )
        if template is not None and system is not None and not _holds(tokenizer.decode(ids), system):
            raise UserError(
                f"the policy's chat template leaves the system message out (tried with {problem.key}): write "
                "task.system: null, "
                "say it in task.instruction, and leave system turns out of the data"
            )
    if template is None and config.task.system is not None:
        return ["task.system is not said: the policy's tokenizer has no chat template"]
    return []


def _examples(task: Task) -> list[Problem]:
    """A problem of each sequence of roles."""
    if isinstance(task.source, RowProblems):
        return [task.source[row] for row in list(task.source.survey.shapes.values())[:_SHAPES]]
    return [task.problems[0]]


def _holds(text: str, part: str) -> bool:
    """Whether a text holds a part, whatever decoding does to spaces."""
    return "".join(part.split()) in "".join(text.split())


def make_room(task: Task, config: RunConfig, tokenizer: Any) -> list[str]:
    """Leaves out prompts without room for a completion, or has each tried when it is chosen.

    Returns:
        Lines for the user.

    Raises:
        UserError: when no prompt fits, or nearly none.
    """
    limit, total = config.rollout.max_context, len(task.rows)
    length = _lengths(task, config, tokenizer)
    bounds = _bounds(task, config, tokenizer)[task.rows]
    doubtful = np.flatnonzero(bounds > limit - config.rollout.max_tokens)
    if not len(doubtful):
        return []
    exact = len(doubtful) <= _TRIED
    tried = doubtful if exact else doubtful[np.linspace(0, len(doubtful) - 1, _SAMPLE).astype(np.int64)]
    lengths = np.array([length(int(task.rows[place])) for place in tried])
    long = tried[lengths >= limit]
    found = _Found(lengths, limit, config.rollout.max_tokens, len(doubtful) / len(tried))
    if total - found.long < (1 if exact else _FEWEST * total):
        raise UserError(
            f"task: {'every prompt has' if exact else 'nearly all prompts have'} {limit} tokens or more, the "
            "shortest that was "
            f"tried {lengths.min()}: raise rollout.max_context"
        )
    if exact and len(long):
        task.rows = np.delete(task.rows, long)
    elif not exact:
        may_be_long = np.zeros(len(task.source), bool)
        may_be_long[task.rows[bounds >= limit]] = True
        task.fits = lambda row: not may_be_long[row] or length(row) < limit
    return found.lines(total, exact)


@dataclass(frozen=True, slots=True)
class _Found:
    """Lengths of the prompts that were measured, each of which stands for ``weight`` others."""

    lengths: np.ndarray
    limit: int
    max_tokens: int
    weight: float

    @property
    def long(self) -> int:
        return round(int((self.lengths >= self.limit).sum()) * self.weight)

    def lines(self, total: int, exact: bool) -> list[str]:
        """Says what is left out, and what will be cut."""
        room = self.limit - self.lengths
        cut = round(int(((room > 0) & (room < self.max_tokens)).sum()) * self.weight)
        about, said = "" if exact else "about ", []
        if self.long:
            said.append(
                f"task: {about}{self.long} of {total} prompts are too long for rollout.max_context "
                f"({self.limit} tokens, the "
                f"longest has {self.lengths.max()}): left out"
            )
        if cut:
            said.append(
                f"task: {about}{cut} of {total} prompts leave room for less than rollout.max_tokens "
                f"({self.max_tokens}) in "
                f"rollout.max_context: their completions are cut there, after {max(room[room > 0].min(), 1)} "
                "tokens or more"
            )
        return said


def _longest_ending(config: RunConfig) -> str:
    """Returns the longest text that the recipe appends to a question to ask for a budget; empty where it asks
    for none.
    """
    return max(
        (" " + config.length.budget_prompt.format(budget=b) for b in config.length.budgets),
        key=len,
        default="",
    )


def _lengths(task: Task, config: RunConfig, tokenizer: Any) -> Any:
    """Returns a function from a problem's number to the tokens of its prompt, with the longest ending that
    the recipe appends.
    """
    ending = _longest_ending(config)

    @lru_cache(_TRIED)
    def length(row: int) -> int:
        return len(encode_problem(tokenizer, task.source[row], config.task, ending))

    return length


def _bounds(task: Task, config: RunConfig, tokenizer: Any) -> np.ndarray:
    """Returns int64 [problems], upper bounds of the prompts' tokens: no text has more tokens than bytes, and
    the chat template adds to each turn at most what it adds to an empty one, and 64 tokens.
    """
    if not isinstance(task.source, RowProblems):
        # problems that are made on demand: their sizes are not known
        return np.full(len(task.source), np.iinfo(np.int64).max)
    survey = task.source.survey
    empty = Problem("", "x", "", lambda completion: 0.0, {}, "")
    added = len(encode_problem(tokenizer, empty, config.task)) + 64
    added += len(config.task.instruction.encode()) + len(_longest_ending(config).encode())
    return survey.sizes.astype(np.int64) + added * survey.turns
