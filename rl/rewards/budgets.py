"""Token budgets that the samples of a prompt are asked to keep to."""

from __future__ import annotations

import random

from paceline.rl.config.length import LengthConfig


def assign_budgets(config: LengthConfig, group_size: int, seed: str) -> list[int] | None:
    """Returns the token budget of each sample of a prompt, or None when the recipe sets no budgets.

    Args:
        config: The recipe's length section.
        group_size: Number of samples per prompt; with ``budget_of: subgroup``, a multiple of the number of
            budgets.
        seed: Seed of the random choice that ``budget_of: prompt`` makes.
    """
    if not config.budgets:
        return None
    if config.budget_of == "prompt":
        return [random.Random(seed).choice(config.budgets)] * group_size
    return [config.budgets[i * len(config.budgets) // group_size] for i in range(group_size)]
