"""Trains new drafters with more or less left context, or at moved positions, for equal time.

Each starts from the same weights and reads the same traces in the same order. All are judged with the whole
text as their context, as they draft, at each part of a completion.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from paceline.benchmarks.common.harness import RolloutBench
from paceline.benchmarks.common.results import Log, Results, RowCallback, ignore_row
from paceline.benchmarks.training.new_drafter import NewDrafters
from paceline.drafter_trainer.learner import DrafterLearner
from paceline.drafter_trainer.objective.draft_objective import Objective
from paceline.drafter_trainer.trace_buffer import Entry, Piece
from paceline.rl.process.invocation import command_line
from paceline.rl.process.process_tuning import fit_process
from paceline.rl.recipe import load_config
from paceline.rollout import Rollout

_WHOLE_TEXT = 10**6  # tokens of context
_SAMPLES = 4  # of a prompt
_DRAFTED = 4  # tokens of the chains whose acceptance length is compared
# positions in the completion; a part has at most as many anchors as a piece
PARTS = ((0, 64), (64, 256), (256, 512), (512, 1024), (1024, 1536), (1536, 2048))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--config", required=True, help="recipe, whose first policy makes the traces")
    parser.add_argument(
        "--contexts",
        type=int,
        nargs="+",
        default=[0, 128, 512, 2048],
        help="tokens of left context to compare",
    )
    parser.add_argument(
        "--microbatches",
        type=int,
        nargs="+",
        help="tokens of a micro-batch to compare; default: the recipe's",
    )
    parser.add_argument(
        "--random-positions",
        action="store_true",
        help="also train with drafter.random_positions, within as many positions as the longest text has",
    )
    parser.add_argument(
        "--trained-until", type=int, help="train on this many tokens of each completion; all are judged"
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="seconds of training per drafter")
    parser.add_argument("--seeds", type=int, default=1, help="number of first weights and orders of traces")
    parser.add_argument("--sequences", type=int, default=96, help="completions; every fourth prompt judges")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/context"), help="JSON file of the results"
    )


def run(args: argparse.Namespace) -> None:
    """Makes the traces once, then trains a drafter with each context and seed."""
    fit_process(local_world_size=1)
    bench = RolloutBench(load_config(args.config), None, 1)
    with Results(args.out, command_line()) as results:
        rollouts = bench.traced(args.sequences, _SAMPLES)
        lengths = sorted(len(r.token_ids) for r in rollouts)
        results.note(lengths={"median": statistics.median(lengths), "longest": lengths[-1]})
        microbatches = args.microbatches or [bench.config.drafter.tokens_per_microbatch]
        moved = [False, True] if args.random_positions else [False]
        variants = [
            Variant(*parts)
            for parts in itertools.product(range(args.seeds), args.contexts, microbatches, moved)
        ]
        compare_contexts(
            bench, rollouts, variants, args.seconds, print, results.into("rows"), args.trained_until
        )


@dataclass(frozen=True, slots=True)
class Variant:
    """How a drafter is trained.

    Attributes:
        seed: Seed of its first weights and of the order of its traces.
        context: Tokens of left context.
        microbatch: Tokens of a micro-batch.
        moved: Whether pieces are moved by random distances.
    """

    seed: int
    context: int
    microbatch: int
    moved: bool


@dataclass(frozen=True, slots=True)
class ContextRow:
    """Holds a new drafter's acceptance after a fixed training time, on sequences that it has not seen.

    Attributes:
        seed: Seed of its first weights and of the order of its traces.
        context: Tokens before a piece that it attended to in training.
        microbatch: Tokens of a micro-batch.
        moved: Whether pieces were moved by random distances in training.
        updates: Number of optimizer steps that fitted into the time.
        anchors: Number of anchors trained on.
        drawn: Expected acceptance length of chains of four drawn draft tokens.
        likeliest: Expected acceptance length of chains of the four likeliest draft tokens.
        by_part: Both lengths at each of `PARTS` that any judged completion reaches, by its first position.
    """

    seed: int
    context: int
    microbatch: int
    moved: bool
    updates: int
    anchors: int
    drawn: float
    likeliest: float
    by_part: dict[int, tuple[float, float]]


def compare_contexts(
    bench: RolloutBench,
    rollouts: Sequence[Rollout],
    variants: Sequence[Variant],
    seconds: float,
    log: Log,
    on_row: RowCallback = ignore_row,
    trained_until: int | None = None,
) -> list[ContextRow]:
    """Trains a drafter for each variant, and judges it on every fourth group.

    Args:
        bench: Policy that made the traces.
        rollouts: Completions with their traces.
        variants: How each drafter is trained.
        seconds: Seconds of training per drafter.
        log: Receives a line per drafter.
        on_row: Called with each row once it is measured.
        trained_until: Completion tokens that are trained on; None for all.
    """
    whole, rows = NewDrafters(bench, rollouts), []
    judged = whole.buffer().held_out
    longest = max(entry.trace.length for entry in judged)
    cut = rollouts if trained_until is None else [_cut(r, trained_until) for r in rollouts]
    drafters = NewDrafters(bench, cut)
    for v in variants:
        positions = longest if v.moved else None
        learner = whole.learner(Objective(unroll=_DRAFTED), v.context, v.seed, positions=positions)
        report, _ = drafters.train(learner, v.microbatch, seconds, v.seed)
        head = (v.seed, v.context, v.microbatch, v.moved, report.updates, report.tokens)
        row = _judged(learner, judged, head)
        rows.append(row)
        on_row(row)
        parts = "  ".join(f"from {first} {drawn:.2f}" for first, (drawn, _) in row.by_part.items())
        log(
            f"seed {v.seed}  context {v.context:>5}  micro-batch {v.microbatch:>4}  "
            f"{'moved' if v.moved else 'real '} positions  {row.updates:>4} updates  "
            f"drawn {row.drawn:.3f}  likeliest {row.likeliest:.3f}  {parts}"
        )
    return rows


def _cut(rollout: Rollout, tokens: int) -> Rollout:
    """Returns a rollout whose trace ends after the first ``tokens`` of its completion."""
    trace = rollout.trace
    assert trace is not None
    end = trace.num_prompt + tokens
    before = trace.refused[:, 0] < end
    shorter = replace(
        trace,
        token_ids=trace.token_ids[:end],
        taps=trace.taps[: end - 1],
        final=trace.final[: end - 1],
        refused=trace.refused[before],
        refused_final=trace.refused_final[before],
    )
    return replace(rollout, token_ids=rollout.token_ids[:tokens], trace=shorter)


def _judged(
    learner: DrafterLearner, entries: Sequence[Entry], head: tuple[int, int, int, bool, int, int]
) -> ContextRow:
    """Judges a drafter with the whole text as context; means are over anchors.

    Args:
        learner: The drafter's learner.
        entries: Held-out sequences.
        head: The row's first values, up to its anchors.
    """
    learner.context = _WHOLE_TEXT
    sums: dict[int, torch.Tensor] = {}
    for entry in entries:
        begin, end = entry.trace.num_prompt - 1, entry.trace.length - 2  # a token must follow to be drafted
        for first, last in PARTS:
            piece = Piece(entry, begin + first, min(begin + last, end))
            if piece.end > piece.begin:
                anchors = piece.end - piece.begin
                lengths = learner.evaluate([piece]).by_piece[:, 0].double() * anchors
                part = torch.cat([lengths, torch.tensor([float(anchors)])])
                sums[first] = sums.get(first, torch.zeros(3, dtype=torch.float64)) + part
    drawn, likeliest, count = torch.stack(list(sums.values())).sum(0).tolist()
    by_part = {first: (float(s[0] / s[2]), float(s[1] / s[2])) for first, s in sorted(sums.items())}
    return ContextRow(*head, drawn / count, likeliest / count, by_part)
