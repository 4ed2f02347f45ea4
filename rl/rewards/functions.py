"""The user's reward functions: loads them by name, calls them as TRL does, and validates what they return."""

from __future__ import annotations

import asyncio
import importlib
import inspect
import itertools
import math
import operator
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.rl.config.task import RewardConfig, TaskConfig
from paceline.rl.errors import UserError, one_line

_MAX_FLOAT32 = 3.4028234e38  # rewards are stored as float32
Score = float | str
"""A completion's score, or a message that says why it has none."""


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A reward function with its weight.

    Attributes:
        name: Name of the function in metrics.
        weight: Factor of its rewards in the weighted sum.
        call: Function in TRL's signature.
    """

    name: str
    weight: float
    call: Callable[..., Any]


def reward_configs(config: TaskConfig) -> tuple[RewardConfig, ...]:
    """Returns the reward functions that a recipe names; empty if the problems' own scorers are used."""
    if config.reward is None:
        return ()
    return (RewardConfig(config.reward),) if isinstance(config.reward, str) else config.reward


def load_reward(path: str) -> Callable[..., Any]:
    """Loads the user's reward function ``module:name``; modules are also found in the current directory.

    The name may contain dots. A class is instantiated without arguments, and its instance is called.

    Raises:
        UserError: If there is no such function, its module cannot be imported, or it cannot be called.
    """
    module, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = operator.attrgetter(name)(importlib.import_module(module))
        function = function() if isinstance(function, type) else function
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"task.reward is {path!r}, which cannot be loaded ({one_line(error, 300)}); write module:function"
        ) from None
    except (Exception, SystemExit) as error:
        raise UserError(
            f"task.reward is {path!r}, whose import fails with {type(error).__name__}: "
            f"{one_line(error, 300)}; fix that module"
        ) from None
    if not callable(function):
        raise UserError(
            f"task.reward is {path!r}, which is of type {type(function).__name__} and cannot be called; name "
            "a function"
        )
    return function


def load_rewards(config: TaskConfig) -> list[RewardFunction]:
    """Loads the recipe's reward functions, and gives functions with equal names distinct ones."""
    loaded: list[RewardFunction] = []
    for entry in reward_configs(config):
        call = load_reward(entry.reward)
        name = str(getattr(call, "__name__", type(call).__name__))
        namesakes = sum(f.name == name or f.name.startswith(f"{name}_") for f in loaded)
        loaded.append(RewardFunction(f"{name}_{namesakes + 1}" if namesakes else name, entry.weight, call))
    return loaded


class WeightedRewards:
    """Calls a recipe's reward functions and adds up their weighted rewards.

    Args:
        functions: At least one reward function.
    """

    def __init__(self, functions: Sequence[RewardFunction]) -> None:
        self.functions = list(functions)
        # one event loop for all calls, because clients that a function keeps are bound to their loop
        self._runner = asyncio.Runner()

    def __call__(
        self, count: int, columns: Mapping[str, Sequence[Any]]
    ) -> tuple[list[Score], dict[str, list[float | None]]]:
        """Scores completions as TRL does: by the weighted sum of those rewards that are not None.

        Args:
            count: Number of completions.
            columns: Keyword arguments for the functions, each a list of ``count`` values; a function without
                ``**`` gets only those that it names.

        Returns:
            For each completion its score, or a message that says why it has none; and each function's rewards
            by function name.
        """
        parts: dict[str, list[float | None]] = {}
        problems: dict[int, str] = {}
        for function in self.functions:
            accepted = _accepted_columns(function.call, columns)
            returned = function.call(**{name: list(values) for name, values in accepted.items()})
            if inspect.isawaitable(returned):
                returned = self._runner.run(_await(returned))
            rewards = [_as_reward(value) for value in _as_list(returned, count, function.name)]
            parts[function.name] = [None if isinstance(reward, str) else reward for reward in rewards]
            for index, reward in enumerate(rewards):
                if isinstance(reward, str):
                    problems.setdefault(index, f"{function.name} returned {reward}")
        return [problems.get(index) or self._total(parts, index) for index in range(count)], parts

    def _total(self, parts: Mapping[str, Sequence[float | None]], index: int) -> Score:
        """Returns the weighted sum of one completion's rewards, or a message that says why there is none."""
        weighted = [f.weight * value for f in self.functions if (value := parts[f.name][index]) is not None]
        if not weighted:
            return "every reward function returned None"
        total = math.fsum(weighted)
        return (
            total if abs(total) <= _MAX_FLOAT32 else f"the weighted sum is {total:g}, too large for float32"
        )


async def _await(awaitable: Any) -> Any:
    return await awaitable


def _accepted_columns(
    call: Callable[..., Any], columns: Mapping[str, Sequence[Any]]
) -> Mapping[str, Sequence[Any]]:
    """Returns the columns that a function takes as keyword arguments."""
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError):  # functions that are not written in Python have no signature
        return columns
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return columns
    return {name: values for name, values in columns.items() if name in parameters}


def _as_list(returned: Any, count: int, name: str) -> list[Any]:
    """Converts what a function returned to a list with one value per completion.

    Raises:
        ValueError: If it does not hold ``count`` values.
    """
    iterable = returned.tolist() if hasattr(returned, "tolist") else returned
    if isinstance(iterable, str | bytes | Mapping | set | frozenset) or not hasattr(iterable, "__iter__"):
        raise ValueError(
            f"{name} returned {returned!r:.60}; return a list of numbers, one for each of the {count} "
            "completions"
        )
    values = list(itertools.islice(iterable, count + 1))  # a generator may never end
    if len(values) != count:
        length = "more" if len(values) > count else str(len(values))
        raise ValueError(f"{name} returned {length} rewards for {count} completions; return one for each")
    return values


def _as_reward(value: Any) -> float | str | None:
    """Returns a reward as a float, None where the function does not apply, or what is wrong with it."""
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    return number if abs(number) <= _MAX_FLOAT32 else f"{value!r:.60}, which is not a finite number"
