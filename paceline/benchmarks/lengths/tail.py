"""Compares mitigations of the long tail on one workload, alone and combined with speculation.

The mitigations are speculation, segments, shared prefixes (tree rollouts) and a length-aware reward.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from paceline.benchmarks.common.results import Log, Results, RowCallback, ignore_row
from paceline.benchmarks.common.runs import finished_run, quarters, step_mean
from paceline.rl.process.console import console
from paceline.rl.process.invocation import command_line

_PLAIN = ("speculation.strategy=plain", "speculation.drafters=[suffix]")
_SEGMENTS = ("rollout.segment_tokens=48", "update.importance=token")
_TREE = ("rollout.tree={segment_tokens: 16, roots: 4, width: 2}", "update.advantage=tree")
_LENGTH_REWARD = ("length.rewards=[{name: grpo_lambda, share: 0.5, alpha: 0.4}]",)
MITIGATIONS: dict[str, tuple[str, ...]] = {
    "none": _PLAIN,
    "speculation": (),
    "segments": (*_PLAIN, *_SEGMENTS),
    "segments, mastered tokens masked": (
        *_PLAIN,
        *_SEGMENTS,
        "update.mask_mastered=0.99",
        "update.mastered_below=0.2",
    ),
    "shared beginnings": (*_PLAIN, *_TREE),
    "grpo_lambda": (*_PLAIN, *_LENGTH_REWARD),
    "speculation and segments": _SEGMENTS,
    "speculation and shared beginnings": _TREE,
    "speculation and grpo_lambda": _LENGTH_REWARD,
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument(
        "--config", type=Path, default=Path("configs/length/long_tail.yaml"), help="recipe of the workload"
    )
    parser.add_argument(
        "--only", nargs="+", help="names of mitigations; the others are compared with the first"
    )
    parser.add_argument("--ranks", type=int, default=2, help="ranks of each run")
    parser.add_argument(
        "--runs", type=Path, default=Path("runs/tail"), help="folder of the runs; finished ones are reused"
    )
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/tail"), help="JSON file of the results"
    )
    parser.add_argument("overrides", nargs="*", help="recipe overrides, key=value")


def run(args: argparse.Namespace) -> None:
    """Trains what is missing and prints a row per mitigation."""
    with Results(args.out, command_line()) as results:
        names, on_row = args.only or list(MITIGATIONS), results.into("rows")
        rows = compare_mitigations(args.config, args.overrides, names, args.runs, args.ranks, print, on_row)
    base = rows[0]
    table = Table(
        "mitigation",
        "rollout s",
        "step s",
        "÷ none, by completion",
        "length",
        "drawn",
        "reward",
        "entropy",
        "ratio spread",
    )
    for r in rows:
        table.add_row(
            r.remedy,
            f"{r.rollout:.2f}",
            f"{r.step:.2f}",
            f"{base.step_by_completion / r.step_by_completion:.2f}",
            f"{r.length:.1f}",
            f"{r.drawn:.2f}",
            f"{r.reward_before:.3f} → {r.reward_after:.3f}",
            f"{r.entropy_before:.3f} → {r.entropy_after:.3f}",
            f"{r.ratio_spread:.4f}",
        )
    console().print(table)


@dataclass(frozen=True, slots=True)
class MitigationRow:
    """Holds the results of one mitigation: means over all steps but the first.

    Attributes:
        remedy: Name of the mitigation in `MITIGATIONS`.
        completions: Number of completions trained on per step.
        rollout: Seconds of a step's rollouts.
        update: Seconds of a step's update.
        step: Seconds of a step.
        step_by_completion: Seconds of a step per completion trained on.
        length: Tokens per completion.
        drawn: Tokens decoded relative to tokens trained on.
        longest_wait: Seconds per step that the first rank to finish waits for the last.
        reward_before: Mean reward over the first quarter of the steps.
        reward_after: Mean reward over the last quarter.
        entropy_before: Entropy per token over the first quarter, in nats.
        entropy_after: Entropy per token over the last quarter, in nats.
        ratio_spread: Standard deviation of the trainer's probability of a token relative to the engine's,
            clipped at the cap.
        stale: Share of tokens drawn under an older policy than the last token of their completion.
        rewards: Mean reward of each step.
        entropies: Entropy of each step, in nats per token.
    """

    remedy: str
    completions: float
    rollout: float
    update: float
    step: float
    step_by_completion: float
    length: float
    drawn: float
    longest_wait: float
    reward_before: float
    reward_after: float
    entropy_before: float
    entropy_after: float
    ratio_spread: float
    stale: float
    rewards: list[float]
    entropies: list[float]


def compare_mitigations(
    config: Path,
    overrides: Sequence[str],
    names: Sequence[str],
    folder: Path,
    ranks: int,
    log: Log,
    on_row: RowCallback = ignore_row,
) -> list[MitigationRow]:
    """Trains a recipe with each mitigation, where its run is missing, and returns their rows.

    Args:
        config: Recipe of the workload.
        overrides: Recipe overrides of every run.
        names: Names of mitigations in `MITIGATIONS`.
        folder: Folder of the runs; finished ones are reused.
        ranks: Number of ranks of each run.
        log: Receives lines about training runs.
        on_row: Called with each row once its run is there.
    """
    rows = []
    for name in names:
        out = folder / name.replace(",", "").replace(" ", "-")
        metrics = finished_run(config, [*overrides, *MITIGATIONS[name]], out, ranks, log)
        rows.append(_row(name, metrics))
        on_row(rows[-1])
    return rows


def _row(name: str, metrics: Sequence[dict[str, Any]]) -> MitigationRow:
    average = partial(step_mean, metrics)
    rewards, entropies = (quarters([m[key] for m in metrics]) for key in ("reward/mean", "update/entropy"))
    completions = average("rollout/completions")
    return MitigationRow(
        remedy=name,
        completions=completions,
        rollout=average("rollout/seconds"),
        update=average("time/update"),
        step=average("time/step"),
        step_by_completion=average("time/step") / completions,
        length=average("length/mean"),
        drawn=1 - average("rollout/shared_share"),
        longest_wait=average("time/wait"),
        reward_before=rewards[0],
        reward_after=rewards[-1],
        entropy_before=entropies[0],
        entropy_after=entropies[-1],
        ratio_spread=average("engine/importance_std"),
        stale=average("rollout/stale_share"),
        rewards=[m["reward/mean"] for m in metrics],
        entropies=[m["update/entropy"] for m in metrics],
    )
