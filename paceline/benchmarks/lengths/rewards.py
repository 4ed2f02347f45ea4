"""Length-aware rewards on one task, seed by seed, beside plain GRPO."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

from paceline.benchmarks.common.results import Keep, ignore
from paceline.benchmarks.common.runs import finished_run, mean, quarters


@dataclass(frozen=True, slots=True)
class RewardRow:
    """A recipe over its seeds; means over the last quarter of the steps.

    Attributes:
        recipe: Its file's name.
        accuracy, length: Share of correct completions, tokens of a completion: mean over seeds.
        accuracy_change, accuracy_error: Less plain GRPO's of the same seeds: mean, and standard error over
            seeds.
        length_ratio: Length ÷ plain GRPO's.
        entropy: Of a token, in nats.
        step: Seconds of a step, as the machine was then.
        seeds: Each one's accuracy and length.
    """

    recipe: str
    accuracy: float
    length: float
    accuracy_change: float
    accuracy_error: float
    length_ratio: float
    entropy: float
    step: float
    seeds: list[tuple[float, float]]


def compare_rewards(
    recipes: Sequence[Path],
    base: Path,
    seeds: Sequence[int],
    folder: Path,
    say: Callable[[str], None],
    keep: Keep = ignore,
) -> list[RewardRow]:
    """Rows of plain GRPO and of each recipe.

    Args:
        recipes: That shape lengths.
        base: That does not.
        seeds: At least two.
        folder: Where the runs are or go.
        say: Progress.
        keep: Takes each row as it comes.
    """
    plain: list[list[float]] = []
    rows = []
    for recipe in (base, *recipes):
        metrics = [
            finished_run(recipe, [f"seed={seed}"], folder / f"{recipe.stem}-{seed}", 1, say) for seed in seeds
        ]
        names = ("reward/exact", "length/mean", "update/entropy", "time/step")
        runs = [[quarters([m[name] for m in run])[-1] for name in names] for run in metrics]
        plain = plain or runs
        rows.append(_row(recipe.stem, runs, plain))
        keep(rows[-1])
    return rows


def _row(recipe: str, runs: Sequence[Sequence[float]], plain: Sequence[Sequence[float]]) -> RewardRow:
    """A recipe's row: accuracy, length, entropy and seconds of a step of each seed, beside plain GRPO's."""
    changes = [run[0] - other[0] for run, other in zip(runs, plain, strict=True)]
    accuracy, length, entropy, step = (mean([run[i] for run in runs]) for i in range(4))
    return RewardRow(
        recipe=recipe,
        accuracy=accuracy,
        length=length,
        accuracy_change=mean(changes),
        accuracy_error=stdev(changes) / len(changes) ** 0.5,
        length_ratio=length / mean([run[1] for run in plain]),
        entropy=entropy,
        step=step,
        seeds=[(run[0], run[1]) for run in runs],
    )
