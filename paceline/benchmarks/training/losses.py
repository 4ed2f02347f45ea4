"""Compares distillation losses after equal training time, and measures what collecting traces costs."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass, replace
from pathlib import Path

from paceline.benchmarks.common.harness import RolloutBench
from paceline.benchmarks.common.results import Log, Results, RowCallback, ignore_row
from paceline.benchmarks.training.new_drafter import NewDrafters
from paceline.drafter_trainer.objective.draft_objective import Objective
from paceline.rl.generation.policy_engine import policy_engine
from paceline.rl.process.invocation import command_line
from paceline.rl.process.process_tuning import fit_process
from paceline.rl.recipe import load_config
from paceline.rollout import PLAIN, RolloutEngine

_HELD_OUT_ANCHORS = 4096
_COLLECTION_PASSES = 3

VARIANTS: dict[str, tuple[Objective, bool]] = {
    "fkl": (Objective("fkl"), False),
    "rkl": (Objective("rkl"), False),
    "jsd": (Objective("jsd"), False),
    "tvd": (Objective("tvd"), False),
    "tvd++": (Objective("tvd++"), False),
    "log_acceptance": (Objective("log_acceptance"), False),
    "length": (Objective("length"), False),
    "fkl, hopeless tokens left out (top 10)": (Objective("fkl", mask_top=10), False),
    "fkl, all positions alike": (Objective("fkl", decay=1.0), False),
    "fkl, one position": (Objective("fkl", unroll=1), False),
    "fkl, only where drafts were refused": (Objective("fkl", feedback_only=True), False),
    "fkl, and after refused tokens": (Objective("fkl", on_policy=0.5), False),
    "fkl, optimistic": (Objective("fkl"), True),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--config", required=True, help="recipe of the run")
    parser.add_argument("--run", type=Path, required=True, help="finished run")
    parser.add_argument("--seconds", type=float, default=45.0, help="seconds of training per loss")
    parser.add_argument("--sequences", type=int, default=192, help="sequences to learn from")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/losses"), help="JSON file of the results"
    )


def run(args: argparse.Namespace) -> None:
    """Measures the cost of collecting traces, then trains a drafter with each loss."""
    fit_process(local_world_size=1)
    bench = RolloutBench(load_config(args.config), args.run, 1, 64)
    with Results(args.out, command_line()) as results:
        cost = collection_cost(bench, _COLLECTION_PASSES)
        results.add("collection", cost)
        print(f"collecting traces: {cost.share:.1%} of rollout time")
        compare_losses(bench, args.seconds, args.sequences, print, results.into("rows"))


@dataclass(frozen=True, slots=True)
class LossRow:
    """Holds a new drafter's acceptance after a fixed training time, on sequences that it has not seen.

    Attributes:
        variant: Name of its objective in `VARIANTS`.
        updates: Number of optimizer steps that fitted into the time.
        seconds: Seconds of training.
        drawn: Expected acceptance length of chains of four drawn draft tokens.
        likeliest: Expected acceptance length of chains of the four likeliest draft tokens.
        by_position: Acceptance probability Σ min(p, q) at each draft position.
    """

    variant: str
    updates: int
    seconds: float
    drawn: float
    likeliest: float
    by_position: list[float]


def compare_losses(
    bench: RolloutBench, seconds: float, sequences: int, log: Log, on_row: RowCallback = ignore_row
) -> list[LossRow]:
    """Trains every variant from the same initial drafter, on the same traces in the same order.

    Args:
        bench: Policy that makes the traces.
        seconds: Seconds of training per variant.
        sequences: Number of sequences to learn from.
        log: Receives a line per variant.
        on_row: Called with each row once it is measured.
    """
    drafters, d, rows = NewDrafters(bench, bench.traced(sequences, 4)), bench.config.drafter, []
    for name, (objective, optimistic) in VARIANTS.items():
        learner = drafters.learner(objective, d.context_tokens, optimistic=optimistic)
        report, buffer = drafters.train(learner, d.tokens_per_microbatch, seconds)
        learner.objective = Objective(unroll=4)
        (pieces,) = buffer.held_out_batches(_HELD_OUT_ANCHORS, 1)
        judged = learner.evaluate(pieces)
        rows.append(
            LossRow(
                name,
                report.updates,
                report.seconds,
                judged.length,
                judged.likeliest_length,
                judged.acceptance,
            )
        )
        on_row(rows[-1])
        log(
            f"{name:<40} {report.updates:>4} updates  drawn {judged.length:.3f}  likeliest "
            f"{judged.likeliest_length:.3f}"
        )
    return rows


def _collection_engine(bench: RolloutBench, longest: int, collects: bool) -> RolloutEngine:
    return policy_engine(
        bench.policy,
        max_slots=32,
        max_context=160 + longest,
        tap_layers=bench.taps if collects else (),
        collect_traces=collects,
    )


@dataclass(frozen=True, slots=True)
class CollectionRow:
    """Holds the seconds of plain rollouts with and without collecting traces, the fastest of passes in turn.

    Attributes:
        without: Seconds without collecting traces.
        collecting: Seconds with collecting traces.
    """

    without: float
    collecting: float

    @property
    def share(self) -> float:
        """The share of the rollouts' time that collecting traces takes."""
        return 1 - self.without / self.collecting


def collection_cost(bench: RolloutBench, passes: int) -> CollectionRow:
    """Measures what collecting traces costs on the workload of 32 sequences.

    Args:
        bench: Policy, workloads and engines.
        passes: Number of timed passes of each kind; the fastest counts.
    """
    (w,) = bench.workloads(("32",))
    longest = max(r.params.max_tokens for r in w.timed)
    engines = [_collection_engine(bench, longest, collects) for collects in (False, True)]
    best = [float("inf")] * 2
    for number in range(passes + 1):
        for i, engine in enumerate(engines):
            engine.use_strategy(PLAIN)
            begin = time.perf_counter()
            engine.generate([replace(r, seed=r.seed + number) for r in w.timed])
            if number:  # the first pass warms up
                best[i] = min(best[i], time.perf_counter() - begin)
    return CollectionRow(*best)
