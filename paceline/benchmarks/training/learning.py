"""Compares finished runs with and without speculation, seed by seed: rewards, lengths, rollouts and steps."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev

from paceline.benchmarks.common.results import Results
from paceline.benchmarks.common.runs import mean, quarters
from paceline.rl.monitoring.summary import read_metrics
from paceline.rl.process.invocation import command_line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument(
        "--speculating", type=Path, nargs="+", required=True, help="finished runs, one per seed"
    )
    parser.add_argument(
        "--plain",
        type=Path,
        nargs="+",
        required=True,
        help="finished runs without speculation, of the same seeds in the same order",
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/learning"), help="JSON file of the results"
    )


def run(args: argparse.Namespace) -> None:
    """Prints each run and the comparison of the pairs."""
    speculating, plain = ([learning_row(path) for path in paths] for paths in (args.speculating, args.plain))
    c = compare_learning(speculating, plain)
    for row in (*speculating, *plain):
        print(
            f"{row.run}: reward {row.reward:.3f}, length {row.length:.1f}, rollouts {row.rollout:.0f} s, "
            f"steps {row.step:.0f} s"
        )
    print(
        f"with speculation: reward {c.reward_difference:+.3f} ± {c.reward_error:.3f}, "
        f"length {c.length_difference:+.1f} ± {c.length_error:.1f}"
    )
    print(
        f"rollouts {c.rollout_ratio:.2f}x, steps {c.step_ratio:.2f}x of {c.bound:.2f}x (Amdahl, at this "
        "rollout ratio)"
    )
    print(f"{c.limit:.2f}x would be the steps' ratio if rollouts took no time")
    with Results(args.out, command_line()) as results:
        results.put("runs", [*speculating, *plain])
        results.add("comparison", c)


@dataclass(frozen=True, slots=True)
class LearningRow:
    """Holds the results of one run.

    Attributes:
        run: Name of its directory.
        reward: Mean reward over the last quarter of its steps.
        length: Mean completion length over the last quarter, in tokens.
        rollout: Seconds of the rollouts of all its steps but the first.
        step: Seconds of all its steps but the first.
    """

    run: str
    reward: float
    length: float
    rollout: float
    step: float


@dataclass(frozen=True, slots=True)
class LearningComparison:
    """Holds the comparison of runs with speculation and runs without, paired by seed.

    Attributes:
        reward_difference: Reward with speculation minus reward without, mean over seeds.
        reward_error: Standard error of ``reward_difference``.
        length_difference: Length with speculation minus length without, mean over seeds, in tokens.
        length_error: Standard error of ``length_difference``.
        rollout_ratio: Seconds of rollouts without speculation relative to with it, over all runs.
        step_ratio: Seconds of steps without speculation relative to with it, over all runs.
        bound: Step ratio that this rollout ratio would give if everything else took as long as without
            speculation (Amdahl).
        limit: Step ratio if rollouts took no time.
    """

    reward_difference: float
    reward_error: float
    length_difference: float
    length_error: float
    rollout_ratio: float
    step_ratio: float
    bound: float
    limit: float


def learning_row(run: Path) -> LearningRow:
    """Returns the row of the finished run in a directory."""
    metrics = read_metrics(run)
    return LearningRow(
        run=run.name,
        reward=quarters([m["reward/mean"] for m in metrics])[-1],
        length=quarters([m["length/mean"] for m in metrics])[-1],
        rollout=sum(m["rollout/seconds"] for m in metrics[1:]),
        step=sum(m["time/step"] for m in metrics[1:]),
    )


def compare_learning(speculating: Sequence[LearningRow], plain: Sequence[LearningRow]) -> LearningComparison:
    """Compares runs of the same seeds, given in the same order; there must be at least two of each."""
    reward, length = (
        _difference([getattr(r, n) for r in speculating], [getattr(r, n) for r in plain])
        for n in ("reward", "length")
    )
    rollouts, steps = sum(r.rollout for r in plain), sum(r.step for r in plain)
    ratio = rollouts / sum(r.rollout for r in speculating)
    return LearningComparison(
        *reward,
        *length,
        rollout_ratio=ratio,
        step_ratio=steps / sum(r.step for r in speculating),
        bound=steps / (steps - rollouts + rollouts / ratio),
        limit=steps / (steps - rollouts),
    )


def _difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    pairs = [x - y for x, y in zip(a, b, strict=True)]
    return mean(pairs), stdev(pairs) / len(pairs) ** 0.5
