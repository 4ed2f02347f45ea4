"""Trains drafters that draft in one pass, or a pass a token, or both, and decodes with each.

All start from the same weights, read the same traces in the same order, and train for equal time. Each then
drafts on problems that it has not seen: chains of equal depth a pass a token and in one pass, in turn with
each other and plain decoding.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from paceline.benchmarks.common.harness import Measurement, RolloutBench, Workload
from paceline.benchmarks.common.results import Log, Results, RowCallback, ignore_row
from paceline.benchmarks.training.new_drafter import NewDrafters
from paceline.drafter_trainer.objective.draft_objective import Objective
from paceline.rl.process.invocation import command_line
from paceline.rl.process.process_tuning import fit_process
from paceline.rl.recipe import load_config
from paceline.rollout import PLAIN, Rollout, RolloutEngine, Strategy
from paceline.rollout.drafters.eagle3_model import Eagle3Model

_HELD_OUT_ANCHORS = 4096


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--config", required=True, help="recipe, whose first policy makes the traces")
    parser.add_argument("--depth", type=int, default=4, help="tokens of a draft, trained and drafted")
    parser.add_argument("--seconds", type=float, default=240.0, help="seconds of training per drafter")
    parser.add_argument("--seeds", type=int, default=1, help="number of first weights and orders of traces")
    parser.add_argument("--timed-seeds", type=int, default=1, help="seeds whose drafters also decode")
    parser.add_argument("--sequences", type=int, default=160, help="completions; every fourth prompt judges")
    parser.add_argument("--rounds", type=int, default=3, help="timed passes of each way to draft, in turn")
    parser.add_argument("--workloads", nargs="+", default=["1", "4"], help="numbers of sequences decoded")
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("benchmarks/results/parallel_drafts"),
        help="JSON file of the results",
    )


def run(args: argparse.Namespace) -> None:
    """Makes the traces once, then trains and times a drafter of each kind and seed."""
    fit_process(local_world_size=1)
    bench = RolloutBench(load_config(args.config), None, 1)
    with Results(args.out, command_line()) as results:
        rollouts = bench.traced(args.sequences, 4)
        for seed in range(args.seeds):
            trained = train_each(
                bench, rollouts, args.depth, args.seconds, seed, print, results.into("trained")
            )
            if seed < args.timed_seeds:
                for row in time_drafts(bench, trained, seed, args.depth, args.workloads, args.rounds):
                    results.add("decoded", row)
                    print(f"  {row}")


def objectives(depth: int) -> dict[str, Objective]:
    """Returns what the drafters are trained for, by name."""
    return {
        "a pass a token": Objective(unroll=depth),
        "one pass": Objective(unroll=1, parallel=depth),
        "both": Objective(unroll=depth, parallel=depth),
    }


@dataclass(frozen=True, slots=True)
class TrainedRow:
    """Holds a new drafter's acceptance after a fixed training time, on sequences that it has not seen.

    Attributes:
        trained: What it was trained for, see `objectives`.
        seed: Seed of its first weights and of the order of its traces.
        updates: Number of optimizer steps that fitted into the time.
        chain: Expected acceptance length of drawn drafts with a pass a token.
        parallel: Expected acceptance length of drawn drafts in one pass; None if it has no mask.
        chain_by_position: Acceptance probability Σ min(p, q) at each position with a pass a token.
        parallel_by_position: Σ min(p, q) at each position in one pass; empty if it has no mask.
    """

    trained: str
    seed: int
    updates: int
    chain: float
    parallel: float | None
    chain_by_position: list[float]
    parallel_by_position: list[float]


@dataclass(frozen=True, slots=True)
class DecodedRow:
    """Holds one way to draft with one drafter on one workload: medians over passes in turn.

    Attributes:
        trained: What the drafter was trained for, see `objectives`.
        seed: Seed of the drafter.
        workload: Number of sequences decoded together.
        strategy: Strategy of all steps.
        over_plain: Tokens per second relative to plain decoding in the same round.
        acceptance_length: Committed tokens per sequence and target forward.
        draft_ms_per_token: Milliseconds spent drafting per committed token.
        draft_ms: Milliseconds spent drafting per sequence and target forward.
    """

    trained: str
    seed: int
    workload: str
    strategy: str
    over_plain: float
    acceptance_length: float
    draft_ms_per_token: float
    draft_ms: float


def train_each(
    bench: RolloutBench,
    rollouts: Sequence[Rollout],
    depth: int,
    seconds: float,
    seed: int,
    log: Log,
    on_row: RowCallback = ignore_row,
) -> dict[str, Eagle3Model]:
    """Trains a drafter for each of `objectives` and judges it on every fourth group.

    Args:
        bench: Policy that made the traces.
        rollouts: Completions with their traces.
        depth: Number of draft positions.
        seconds: Seconds of training per drafter.
        seed: Seed of the first weights and of the order of the traces.
        log: Receives a line per drafter.
        on_row: Called with each row once it is measured.

    Returns:
        The drafters by what they were trained for.
    """
    drafters, d, trained = NewDrafters(bench, rollouts), bench.config.drafter, {}
    for name, objective in objectives(depth).items():
        learner = drafters.learner(objective, d.context_tokens, seed)
        report, buffer = drafters.train(learner, d.tokens_per_microbatch, seconds, seed, as_warmup=True)
        (pieces,) = buffer.held_out_batches(_HELD_OUT_ANCHORS, 1)
        learner.objective = Objective(unroll=depth)
        chain = learner.evaluate(pieces)
        parallel = None
        if objective.parallel:
            learner.objective = Objective(unroll=1, parallel=depth)
            parallel = learner.evaluate(pieces)
        row = TrainedRow(
            name,
            seed,
            report.updates,
            chain.length,
            None if parallel is None else parallel.length,
            chain.acceptance,
            [] if parallel is None else parallel.parallel_acceptance,
        )
        on_row(row)
        in_one = "" if row.parallel is None else f", {row.parallel:.2f} in one pass"
        log(f"seed {seed}  {name:<16} {row.updates:>5} updates  {row.chain:.2f} a pass a token{in_one}")
        trained[name] = learner.model
    return trained


def time_drafts(
    bench: RolloutBench,
    trained: Mapping[str, Eagle3Model],
    seed: int,
    depth: int,
    workloads: Sequence[str],
    rounds: int,
) -> list[DecodedRow]:
    """Decodes each workload plainly and with every drafter in each way that it can draft, in turn.

    Args:
        bench: Policy and workloads.
        trained: Drafters by what they were trained for.
        seed: Seed of the drafters.
        depth: Tokens of a draft.
        workloads: Names of the workloads.
        rounds: Number of timed passes of each way to draft.
    """
    rows = []
    for w in bench.workloads(workloads):
        engines = {name: _engine(bench, drafter, w) for name, drafter in trained.items()}
        ways = [
            (name, Strategy(drafts, depth)) for name, engine in engines.items() for drafts in engine.drafters
        ]
        plain: list[Measurement] = []
        passes: dict[tuple[str, Strategy], list[Measurement]] = {way: [] for way in ways}
        for _ in range(rounds):
            plain.append(bench.measure(w, str(PLAIN), PLAIN, next(iter(engines.values()))))
            for name, strategy in ways:
                measured = bench.measure(w, str(strategy), strategy, engines[name])
                passes[name, strategy].append(measured)
        rows += [_decoded((name, seed, w.name, str(s)), passes[name, s], plain) for name, s in ways]
    return rows


def _engine(bench: RolloutBench, drafter: Eagle3Model, w: Workload) -> RolloutEngine:
    """Returns an engine that drafts a pass a token, and in one pass if the drafter has learned it."""
    bench.set_drafter(drafter)
    return bench.engine(w.slots, max(r.params.max_tokens for r in w.timed), drafters=bench.eagle3_ways())


def _decoded(
    head: tuple[str, int, str, str], passes: Sequence[Measurement], plain: Sequence[Measurement]
) -> DecodedRow:
    """Returns the medians over the passes of one way to draft.

    Args:
        head: The row's first values, up to the strategy.
        passes: The passes.
        plain: Those of plain decoding in the same rounds.
    """
    ratios = [a.tokens_per_second / b.tokens_per_second for a, b in zip(passes, plain, strict=True)]
    accepted = passes[0].acceptance_length
    assert accepted is not None
    per_token = statistics.median(m.draft_ms_per_token for m in passes)
    return DecodedRow(*head, statistics.median(ratios), accepted, per_token, per_token * accepted)
