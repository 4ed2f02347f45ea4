"""TRL's own generation beside Paceline's rollouts in the same trainer: learning, and what a step takes."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import stdev
from typing import Any

from paceline.benchmarks.common.results import Keep, ignore
from paceline.benchmarks.common.runs import mean, run_ranks
from paceline.rl.errors import UserError


@dataclass(frozen=True, slots=True)
class TrlRow:
    """One side, over all steps but the first, which loads and measures.

    Attributes:
        rollouts: ``trl`` or ``paceline``.
        steps: How many.
        step, generation: Seconds; generation holds what the drafter's training and sharing add.
        tokens: Of a completion.
        rewards: Mean of each step, the first too.
    """

    rollouts: str
    steps: int
    step: float
    generation: float
    tokens: float
    rewards: list[float]


@dataclass(frozen=True, slots=True)
class TrlPair:
    """The two sides on the same prompts.

    Attributes:
        step_ratio, generation_ratio: Seconds of TRL's own ÷ with our rollouts.
        by_token: The same for the generation of a token: lengths differ by chance.
        equal_lengths: Step ratio with TRL's own updates and completions, and its generation divided by
            ``by_token``.
        limit: Step ratio of rollouts that took no time.
        reward_difference, reward_error: Ours less TRL's, mean over steps, and its standard error.
    """

    step_ratio: float
    generation_ratio: float
    by_token: float
    equal_lengths: float
    limit: float
    reward_difference: float
    reward_error: float


def compare_trl(
    config: str,
    drafter: Path,
    folder: Path,
    ranks: int,
    overrides: Sequence[str],
    say: Callable[[str], None],
    keep: Keep = ignore,
) -> tuple[list[TrlRow], TrlPair]:
    """Trains a recipe's task in TRL with either, where that is not there yet.

    Raises:
        UserError: when a run fails, see `run_ranks`.
    """
    rows = []
    for side in ("trl", "paceline"):
        out = folder / side
        if not (out / "steps.jsonl").is_file():
            if not drafter.is_dir():
                raise UserError(
                    f"--drafter {drafter}: not there; make it with paceline warmup {config} --drafter "
                    f"{drafter}"
                )
            run_ranks(
                "paceline.benchmarks.training.trl_run",
                [config, "--rollouts", side, "--drafter", str(drafter), *overrides],
                out,
                ranks,
                say,
            )
        rows.append(_row(side, [json.loads(line) for line in (out / "steps.jsonl").read_text().splitlines()]))
        keep(rows[-1])
    theirs, ours = rows
    by_token = theirs.generation / theirs.tokens / (ours.generation / ours.tokens)
    differences = [a - b for a, b in zip(ours.rewards, theirs.rewards, strict=True)]
    return rows, TrlPair(
        step_ratio=theirs.step / ours.step,
        generation_ratio=theirs.generation / ours.generation,
        by_token=by_token,
        equal_lengths=theirs.step / (theirs.step - theirs.generation + theirs.generation / by_token),
        limit=theirs.step / (theirs.step - theirs.generation),
        reward_difference=mean(differences),
        reward_error=stdev(differences) / len(differences) ** 0.5,
    )


def _row(side: str, steps: Sequence[dict[str, Any]]) -> TrlRow:
    later = steps[1:]
    return TrlRow(
        rollouts=side,
        steps=len(later),
        step=mean([s["seconds"] for s in later]),
        generation=mean([s["generation"] for s in later]),
        tokens=mean([s["completions/mean_length"] for s in later]),
        rewards=[s["reward"] for s in steps],
    )
