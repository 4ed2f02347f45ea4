"""Remedies of the tail on one workload: speculation, segments, shared beginnings, a length-aware reward, and
together.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paceline.benchmarks.common.results import Keep, ignore
from paceline.benchmarks.common.runs import finished_run, mean, quarters

_PLAIN = ("speculation.strategy=plain", "speculation.drafters=[suffix]")
_SEGMENTS = ("rollout.segment_tokens=48", "update.importance=token")
_TREE = ("rollout.tree={segment_tokens: 16, roots: 4, width: 2}", "update.advantage=tree")
_BRIEF = ("length.rewards=[{name: grpo_lambda, share: 0.5, alpha: 0.4}]",)
REMEDIES: dict[str, tuple[str, ...]] = {
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
    "grpo_lambda": (*_PLAIN, *_BRIEF),
    "speculation and segments": _SEGMENTS,
    "speculation and shared beginnings": _TREE,
    "speculation and grpo_lambda": _BRIEF,
}


@dataclass(frozen=True, slots=True)
class RemedyRow:
    """A remedy, over all steps but the first.

    Attributes:
        remedy: Name.
        completions: Trained on in a step.
        rollout, update, step: Seconds of a step.
        step_by_completion: Seconds of a step for each completion that was trained on.
        length: Tokens of a completion.
        drawn: Tokens decoded ÷ tokens trained on.
        longest_wait: Seconds that the first rank to finish waits for the last, a step.
        reward_before, reward_after: First and last quarter.
        entropy_before, entropy_after: Likewise, nats a token.
        ratio_spread: Standard deviation of trainer ÷ engine probability of a token, cut at the cap.
        stale: Share of tokens drawn under an older policy than their completion's last.
        rewards, entropies: Of each step.
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


def compare_remedies(
    config: Path,
    overrides: Sequence[str],
    names: Sequence[str],
    folder: Path,
    ranks: int,
    say: Callable[[str], None],
    keep: Keep = ignore,
) -> list[RemedyRow]:
    """Trains a recipe with each remedy, where its run is not there yet, and tells what its steps took."""
    rows = []
    for name in names:
        run = folder / name.replace(",", "").replace(" ", "-")
        rows.append(_row(name, finished_run(config, [*overrides, *REMEDIES[name]], run, ranks, say)))
        keep(rows[-1])
    return rows


def _row(name: str, metrics: Sequence[dict[str, Any]]) -> RemedyRow:
    later = metrics[1:]

    def average(key: str) -> float:
        return mean([m[key] for m in later])

    rewards, entropies = (quarters([m[key] for m in metrics]) for key in ("reward/mean", "update/entropy"))
    completions = average("rollout/completions")
    return RemedyRow(
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
