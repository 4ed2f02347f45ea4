"""Reward functions of the user's: found by name, called as TRL calls them, and what they return read
strictly.
"""

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

_LARGEST = 3.4028234e38  # of float32, in which rewards are kept
Score = float | str
"""The score of a completion, or why it has none."""


@dataclass(frozen=True, slots=True)
class RewardFunction:
    """A reward function with its weight.

    Attributes:
        name: In metrics.
        weight: By which its rewards are multiplied before they are added up.
        call: In TRL's signature.
    """

    name: str
    weight: float
    call: Callable[..., Any]


def reward_configs(config: TaskConfig) -> tuple[RewardConfig, ...]:
    """The reward functions that a recipe names; none where the problems' own scorers are taken."""
    if config.reward is None:
        return ()
    return (RewardConfig(config.reward),) if isinstance(config.reward, str) else config.reward


def load_reward(path: str) -> Callable[..., Any]:
    """A reward function of the user's, ``module:name``, looked up from the current directory too.

    The name may have dots. A class is instantiated without arguments and its instance called.

    Raises:
        UserError: when there is none, when its module cannot be imported, or when it cannot be called.
    """
    module, _, name = path.partition(":")
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        found = operator.attrgetter(name)(importlib.import_module(module))
        found = found() if isinstance(found, type) else found
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"task.reward is {path!r}: {one_line(error, 300)}; write module:function") from None
    except (Exception, SystemExit) as error:
        raise UserError(
            f"task.reward is {path!r}: importing it fails ({type(error).__name__}: {one_line(error, 300)})"
        ) from None
    if not callable(found):
        raise UserError(
            f"task.reward is {path!r}, which is of type {type(found).__name__} and cannot be called; name a "
            "function"
        )
    return found


def load_rewards(config: TaskConfig) -> list[RewardFunction]:
    """The recipe's reward functions, under names that differ."""
    loaded: list[RewardFunction] = []
    for entry in reward_configs(config):
        call = load_reward(entry.reward)
        name = str(getattr(call, "__name__", type(call).__name__))
        taken = sum(f.name == name or f.name.startswith(f"{name}_") for f in loaded)
        loaded.append(RewardFunction(f"{name}_{taken + 1}" if taken else name, entry.weight, call))
    return loaded


class Rewards:
    """Calls a recipe's reward functions and adds up what they return.

    Args:
        functions: At least one.
    """

    def __init__(self, functions: Sequence[RewardFunction]) -> None:
        self.functions = list(functions)
        # one event loop for all calls: clients that a function keeps belong to it
        self._runner = asyncio.Runner()

    def __call__(
        self, count: int, columns: Mapping[str, Sequence[Any]]
    ) -> tuple[list[Score], dict[str, list[float | None]]]:
        """Scores completions, as TRL does: the weighted sum of those rewards that are not None.

        Args:
            count: Completions.
            columns: Keyword arguments, a list of ``count`` values each; a function without ``**`` gets those
                that it names.

        Returns:
            The score of each completion, or why it has none, and each function's rewards by its name.
        """
        parts: dict[str, list[float | None]] = {}
        problems: dict[int, str] = {}
        for function in self.functions:
            wanted = _accepted(function.call, columns)
            returned = function.call(**{name: list(values) for name, values in wanted.items()})
            if inspect.isawaitable(returned):
                returned = self._runner.run(_awaited(returned))
            numbers = [_number(value) for value in _listed(returned, count, function.name)]
            parts[function.name] = [None if isinstance(number, str) else number for number in numbers]
            for place, number in enumerate(numbers):
                if isinstance(number, str):
                    problems.setdefault(place, f"{function.name} returned {number}")
        return [problems.get(place) or self._total(parts, place) for place in range(count)], parts

    def _total(self, parts: Mapping[str, Sequence[float | None]], place: int) -> Score:
        weighted = [f.weight * value for f in self.functions if (value := parts[f.name][place]) is not None]
        if not weighted:
            return "every reward function returned None"
        total = math.fsum(weighted)
        return total if abs(total) <= _LARGEST else f"the weighted sum is {total:g}, too large for float32"


async def _awaited(something: Any) -> Any:
    return await something


def _accepted(call: Callable[..., Any], columns: Mapping[str, Sequence[Any]]) -> Mapping[str, Sequence[Any]]:
    try:
        parameters = inspect.signature(call).parameters
    except (TypeError, ValueError):  # of a function that is not written in Python
        return columns
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return columns
    return {name: values for name, values in columns.items() if name in parameters}


def _listed(returned: Any, count: int, name: str) -> list[Any]:
    """What a function returned, as a list of one value for each completion.

    Raises:
        ValueError: when it is none.
    """
    listed = returned.tolist() if hasattr(returned, "tolist") else returned
    if isinstance(listed, str | bytes | Mapping | set | frozenset) or not hasattr(listed, "__iter__"):
        raise ValueError(
            f"{name} returned {returned!r:.60}; return a list of numbers, one for each of the {count} "
            "completions"
        )
    values = list(itertools.islice(listed, count + 1))
    if len(values) != count:
        found = "more" if len(values) > count else str(len(values))
        raise ValueError(f"{name} returned {found} rewards for {count} completions")
    return values


def _number(value: Any) -> float | str | None:
    """A reward as a float, None where the function does not apply, or in words what it is instead."""
    if value is None:
        return None
    try:
        number = math.nan if isinstance(value, str | bytes) else float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    return number if abs(number) <= _LARGEST else f"{value!r:.60}, which is no finite number"
