"""Checks before the first step that the chat template accepts a task's prompts, and that they fit."""

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

_MAX_ENCODED = 4096  # beyond it only a sample is encoded before the first step, the others when chosen
_SAMPLE_SIZE = 1024
_MAX_ROLE_SEQUENCES = 64  # bounds the time that trying the template takes
_MIN_FITTING_SHARE = 0.05  # of all prompts, as estimated from the sample


def check_prompts(task: Task, config: RunConfig, tokenizer: Any) -> list[str]:
    """Tries the chat template, drops prompts without room in ``rollout.max_context``, and counts the rest.

    If only few prompts may be too long, judged by their size in bytes, all of these are measured. Otherwise a
    sample is measured, and each other prompt when it is chosen, so that the start does not wait for a large
    data set. Either way all ranks drop the same prompts.

    Args:
        task: Problems; those with too long prompts are removed.
        config: The recipe.
        tokenizer: The policy's tokenizer.

    Returns:
        Lines for the user.

    Raises:
        UserError: If the chat template rejects what the data or the recipe asks for, or if fewer prompts are
            left than ``rollout.prompts_per_step``.
    """
    lines = [
        *task.notes,
        *_try_template(task, config, tokenizer),
        *drop_long_prompts(task, config, tokenizer),
    ]
    check_count(task, config, lines)
    return lines


def check_count(task: Task, config: RunConfig, lines: Sequence[str]) -> None:
    """Checks that a step need not repeat a prompt.

    Args:
        task: Problems that are left after too long ones were dropped.
        config: The recipe.
        lines: What the user was told about the task, repeated in the error.

    Raises:
        UserError: If there are fewer problems than prompts in a step.
    """
    required, available = config.rollout.prompts_per_step, len(task.rows)
    if available < required:
        raise UserError(
            f"rollout.prompts_per_step is {required}, but the task has {available} usable problems, so a "
            f"step would repeat a prompt; write at most {available}, or add problems"
            f"{''.join(f' ({line})' for line in lines)}"
        )


def check_recipe(task: Task, config: RunConfig) -> list[str]:
    """Runs `check_prompts` without loading the policy; without a tokenizer, only counts problems.

    Raises:
        UserError: If `check_prompts` or `check_count` raises it.
    """
    tokenizer = _tokenizer(config.policy.model)
    if tokenizer is None:
        check_count(task, config, task.notes)
        return [
            *task.notes,
            f"policy.model {config.policy.model}: no tokenizer is available, so prompts were not measured or "
            "tried with a chat template",
        ]
    return check_prompts(task, config, tokenizer)


def _tokenizer(model: str) -> Any:
    """Loads a policy's tokenizer from its directory, the cache or the hub.

    Returns None if there is none, which is reported where the policy is loaded.
    """
    path = cached_policy(model)
    try:
        return AutoTokenizer.from_pretrained(
            model if path is None else path, local_files_only=path is not None or not hub_answers()
        )
    except Exception:  # there is no such model, it is gated, or it has no tokenizer
        return None


def _try_template(task: Task, config: RunConfig, tokenizer: Any) -> list[str]:
    """Encodes one problem of each sequence of roles.

    Returns:
        Lines for the user.

    Raises:
        UserError: If the chat template rejects a conversation, drops the system message, or does not read one
            of ``task.chat_template_kwargs``.
    """
    template = getattr(tokenizer, "chat_template", None)
    kwargs = config.task.chat_template_kwargs
    if template is None and kwargs:
        raise UserError(
            f"task.chat_template_kwargs sets {', '.join(kwargs)}, but the policy's tokenizer has no chat "
            "template; remove it"
        )
    for name in kwargs if template is not None else ():
        if not re.search(rf"\b{re.escape(name)}\b", str(template)):
            raise UserError(
                f"task.chat_template_kwargs sets {name}, which the policy's chat template does not read; "
                "remove it"
            )
    for problem in _examples(task):
        try:
            ids = encode_problem(tokenizer, problem, config.task)
        except UserError as error:
            raise UserError(f"{error} (tried with {problem.key})") from None
        system = next(
            (t["content"] for t in problem.messages or () if t["role"] == "system"), config.task.system
        )
        if template is not None and system is not None and not _contains(tokenizer.decode(ids), system):
            raise UserError(
                f"the policy's chat template drops the system message (tried with {problem.key}); set "
                "task.system: null, move its text to task.instruction, and remove system turns from the data"
            )
    if template is None and config.task.system is not None:
        return ["task.system is ignored: the policy's tokenizer has no chat template"]
    return []


def _examples(task: Task) -> list[Problem]:
    """Returns one problem of each sequence of roles."""
    if isinstance(task.source, RowProblems):
        return [
            task.source[row] for row in list(task.source.survey.role_sequences.values())[:_MAX_ROLE_SEQUENCES]
        ]
    return [task.problems[0]]


def _contains(text: str, part: str) -> bool:
    """Whether a text contains a part, ignoring white space, which decoding may change."""
    return "".join(part.split()) in "".join(text.split())


def drop_long_prompts(task: Task, config: RunConfig, tokenizer: Any) -> list[str]:
    """Drops prompts that leave no room for a completion, or has each prompt tried when it is chosen.

    Returns:
        Lines for the user.

    Raises:
        UserError: If no prompt fits, or nearly none of a sample.
    """
    limit, total = config.rollout.max_context, len(task.rows)
    length = _lengths(task, config, tokenizer)
    bounds = _bounds(task, config, tokenizer)[task.rows]
    possibly_long = np.flatnonzero(bounds > limit - config.rollout.max_tokens)
    if not len(possibly_long):
        return []
    exact = len(possibly_long) <= _MAX_ENCODED
    sample = np.linspace(0, len(possibly_long) - 1, _SAMPLE_SIZE).astype(np.int64)
    encoded = possibly_long if exact else possibly_long[sample]
    lengths = np.array([length(int(task.rows[position])) for position in encoded])
    measured = _MeasuredPrompts(lengths, limit, config.rollout.max_tokens, len(possibly_long) / len(encoded))
    if total - measured.too_long < (1 if exact else _MIN_FITTING_SHARE * total):
        raise UserError(
            f"rollout.max_context is {limit}, but "
            f"{'every prompt has' if exact else 'nearly all prompts have'} at least that many tokens (the "
            f"shortest has {lengths.min()}); raise it"
        )
    if exact:
        task.rows = np.delete(task.rows, encoded[lengths >= limit])
    else:
        may_be_long = np.zeros(len(task.source), bool)
        may_be_long[task.rows[bounds >= limit]] = True
        task.fits = lambda row: not may_be_long[row] or length(row) < limit
    return measured.lines(total, exact)


@dataclass(frozen=True, slots=True)
class _MeasuredPrompts:
    """Lengths of the encoded prompts, each of which represents ``weight`` prompts.

    Attributes:
        lengths: int64 [encoded prompts], in tokens.
        limit: ``rollout.max_context``.
        max_tokens: ``rollout.max_tokens``.
        weight: Number of prompts that each length stands for.
    """

    lengths: np.ndarray
    limit: int
    max_tokens: int
    weight: float

    @property
    def too_long(self) -> int:
        """The estimated number of prompts without room for a completion."""
        return round(int((self.lengths >= self.limit).sum()) * self.weight)

    def lines(self, total: int, exact: bool) -> list[str]:
        """Describes how many prompts are left out, and how many completions will be truncated."""
        room = self.limit - self.lengths
        truncated = round(int(((room > 0) & (room < self.max_tokens)).sum()) * self.weight)
        about, lines = "" if exact else "about ", []
        if self.too_long:
            lines.append(
                f"task: {about}{self.too_long} of {total} prompts are too long for rollout.max_context "
                f"({self.limit} tokens, the longest has {self.lengths.max()}) and are left out"
            )
        if truncated:
            lines.append(
                f"task: {about}{truncated} of {total} prompts leave fewer than rollout.max_tokens "
                f"({self.max_tokens}) tokens in rollout.max_context, so their completions are truncated, the "
                f"shortest after {max(room[room > 0].min(), 1)} tokens"
            )
        return lines


def _longest_ending(config: RunConfig) -> str:
    """Returns the longest text that asks for a budget at the end of a question; empty without budgets."""
    return max(
        (" " + config.length.budget_prompt.format(budget=b) for b in config.length.budgets),
        key=len,
        default="",
    )


def _lengths(task: Task, config: RunConfig, tokenizer: Any) -> Any:
    """Returns a function from a problem's number to the length of its prompt in tokens.

    The length includes the longest ending that the recipe appends.
    """
    ending = _longest_ending(config)

    @lru_cache(_MAX_ENCODED)
    def length(row: int) -> int:
        return len(encode_problem(tokenizer, task.source[row], config.task, ending))

    return length


def _bounds(task: Task, config: RunConfig, tokenizer: Any) -> np.ndarray:
    """Returns int64 [problems], upper bounds of the prompts' lengths in tokens.

    A text has at most as many tokens as bytes, and the chat template adds to each turn at most what it adds
    to an almost empty one, plus 64 tokens.
    """
    if not isinstance(task.source, RowProblems):
        # reasoning-gym creates problems on demand, so that their sizes are not known
        return np.full(len(task.source), np.iinfo(np.int64).max)
    survey = task.source.survey
    empty = Problem("", "x", "", lambda completion: 0.0, {}, "")
    added = len(encode_problem(tokenizer, empty, config.task)) + 64
    added += len(config.task.instruction.encode()) + len(_longest_ending(config).encode())
    return survey.sizes.astype(np.int64) + added * survey.turns
