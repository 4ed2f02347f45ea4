"""The drafter trained in idle time beside one that stays as it is: what training costs a step, and what it brings."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rl.bench_runs import mean, quarters, train_recipe


@dataclass(frozen=True, slots=True)
class IdleRow:
    """One run.

    Attributes:
        schedule: ``drafter.schedule``.
        step: Mean seconds of a step, the first left out.
        rollout: Of its rollouts, the slowest rank's.
        training: Seconds of drafter training, all ranks and steps.
        inside: Share of them in which another rank was still decoding.
        on_path: Mean seconds of a step by which training delayed it.
        updates: Of the drafter.
        acceptance: Acceptance length by quarter of the run.
        reward: Mean reward by quarter.
    """

    schedule: str
    step: float
    rollout: float
    training: float
    inside: float
    on_path: float
    updates: int
    acceptance: list[float]
    reward: list[float]


def compare_idle(
    config: Path, overrides: Sequence[str], start: Path, out: Path, ranks: int, say: Callable[[str], None]
) -> list[IdleRow]:
    """Trains the recipe twice from the same policy, drafter and seed: drafter frozen, and trained on idle ranks.

    Raises:
        UserError: when a run fails, with its last line.
    """
    rows = []
    for schedule in ("never", "idle"):
        options = [*overrides, f"drafter.start={start}", f"drafter.schedule={schedule}", "measure.plain_every=0"]
        metrics = train_recipe(config, options, out / schedule, ranks)
        timed = metrics[1:] or metrics
        training = sum(m["drafter/seconds"] for m in metrics)
        row = IdleRow(
            schedule=schedule,
            step=mean([m["time/step"] for m in timed]),
            rollout=mean([m["rollout/seconds"] for m in timed]),
            training=training,
            inside=sum(m["drafter/seconds_off_path"] for m in metrics) / training if training else 1.0,
            on_path=mean([m["drafter/seconds_on_path"] for m in timed]),
            updates=sum(m.get("drafter/updates", 0) for m in metrics),
            acceptance=quarters([m["rollout/acceptance_length"] for m in metrics]),
            reward=quarters([m["reward/mean"] for m in metrics]),
        )
        say(f"{schedule}: a step {row.step:.2f} s, {row.updates} updates, {row.inside:.0%} of training in idle time")
        say(f"{schedule}: acceptance length by quarter {', '.join(f'{a:.2f}' for a in row.acceptance)}")
        rows.append(row)
    return rows
