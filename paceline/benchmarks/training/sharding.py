"""One recipe trained in every way that weights can lie: the same curve, and what gathering them for the
engine takes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from paceline.benchmarks.common.results import Keep, ignore
from paceline.benchmarks.common.runs import mean, train_recipe

WAYS = {
    "replicated": (),
    **{f"ZeRO {stage}": (f"scale.deepspeed=configs/deepspeed/zero{stage}.json",) for stage in range(4)},
    "FSDP2": ("scale.fsdp2=true",),
}


@dataclass(frozen=True, slots=True)
class ShardingRow:
    """One way.

    Attributes:
        way: Its name.
        losses: Of each step's update.
        loss_gap: Largest difference to the replicated run's, over steps.
        gather, update, step: Mean seconds of a step, the first left out.
        peak_gb: Memory of all ranks.
        logprob_gap: Largest difference between the engine's and the trainer's log-prob of a token.
    """

    way: str
    losses: list[float]
    loss_gap: float
    gather: float
    update: float
    step: float
    peak_gb: float
    logprob_gap: float


def compare_sharding(
    config: Path,
    overrides: Sequence[str],
    out: Path,
    ranks: int,
    say: Callable[[str], None],
    keep: Keep = ignore,
) -> list[ShardingRow]:
    """Trains the recipe from the same policy and seed in every way.

    Raises:
        UserError: when a run fails, with its last line.
    """
    rows: list[ShardingRow] = []
    for way, options in WAYS.items():
        metrics = train_recipe(config, [*overrides, *options], out / way.lower().replace(" ", ""), ranks, say)
        losses = [m["update/loss"] for m in metrics]
        first = rows[0].losses if rows else losses
        timed = metrics[1:] or metrics
        row = ShardingRow(
            way=way,
            losses=losses,
            loss_gap=max(abs(a - b) for a, b in zip(losses, first, strict=True)),
            gather=mean([m.get("time/gather", 0.0) for m in timed]),
            update=mean([m["time/update"] for m in timed]),
            step=mean([m["time/step"] for m in timed]),
            peak_gb=max(m["memory/peak_gb"] for m in metrics),
            logprob_gap=max(m["engine/logprob_gap_max"] for m in metrics),
        )
        say(
            f"{way}: loss within {row.loss_gap:.1e}, gather {row.gather:.2f} s, update {row.update:.2f} s, "
            f"{row.peak_gb:.1f} GB"
        )
        rows.append(row)
        keep(row)
    return rows
