"""Token budgets that the samples of a prompt are asked to keep to."""

from __future__ import annotations

import random

from paceline.rl.config.length import LengthConfig


def assign_budgets(config: LengthConfig, group_size: int, seed: str) -> list[int] | None:
    """The budget of each sample of a prompt; None where none are asked for.

    Args:
        config: The recipe's length section.
        group_size: Samples of a prompt; for subgroups a multiple of the number of budgets.
        seed: Of the choice, where a prompt draws one.
    """
    if not config.budgets:
        return None
    if config.budget_of == "prompt":
        return [random.Random(seed).choice(config.budgets)] * group_size
    return [config.budgets[i * len(config.budgets) // group_size] for i in range(group_size)]
