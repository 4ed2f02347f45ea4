"""Compares online learners of the drafter on one moving policy, by regret to the best fixed drafter."""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from paceline.benchmarks.common.results import Log, Results
from paceline.benchmarks.common.runs import deadline_passed
from paceline.drafter_trainer.learner import DrafterLearner
from paceline.drafter_trainer.objective.draft_objective import Objective
from paceline.drafter_trainer.spot_trainer import LearnerReport, SpotTrainer
from paceline.drafter_trainer.storage.checkpoint import load_drafter
from paceline.drafter_trainer.trace_buffer import Piece, TraceBuffer
from paceline.rl.config.drafter import DrafterConfig
from paceline.rl.config.run import RunConfig
from paceline.rl.drafting.factory import drafter_autocast, spot_trainer, trace_buffer
from paceline.rl.drafting.shared import SharedDrafter
from paceline.rl.monitoring.tracker import Tracker
from paceline.rl.process.invocation import command_line
from paceline.rl.process.process_tuning import fit_process
from paceline.rl.recipe import load_config
from paceline.rl.trainer import Trainer, make_accelerator
from paceline.rl.types import RankRollouts
from paceline.rollout.drafters.eagle3_model import Eagle3Model

VARIANTS: dict[str, Callable[[DrafterConfig], DrafterConfig]] = {
    "AdamW": lambda d: d,
    "optimistic": lambda d: replace(d, optimistic=True),
    "verification feedback only": lambda d: replace(d, feedback_only=True),
    "ensemble of 0.3, 1 and 3 times the learning rate": lambda d: replace(d, ensemble=(0.3, 1.0, 3.0)),
}
_CHAIN = 4  # draft positions that are judged
_JUDGED_TOKENS = 512  # tokens of a step's rollouts that drafters are judged on
_SNAPSHOT_EVERY = 6  # steps between the drafters that are compared in hindsight


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--config", required=True, help="recipe of the run")
    parser.add_argument(
        "--start", type=Path, required=True, help="initial drafter, made by launch/warmup_drafter.py"
    )
    parser.add_argument(
        "--seconds", type=float, default=2.0, help="seconds of training per learner after a step's rollouts"
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/online"), help="folder of the run")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/online"), help="JSON file of the results"
    )
    parser.add_argument("overrides", nargs="*", help="recipe overrides, key=value")


def run(args: argparse.Namespace) -> None:
    """Trains the policy with all learners beside each other and prints their regrets."""
    fit_process(local_world_size=1)
    config = load_config(args.config, args.overrides)
    with Results(args.out, command_line()) as results:
        rows = compare_online(
            config, args.start, args.seconds, args.runs, print, lambda rows: results.put("rows", rows)
        )
        results.put("rows", rows)
    for row in rows:
        mean = sum(row.lengths) / len(row.lengths)
        print(
            f"{row.variant:<50} {row.updates:>4} updates  mean length {mean:.3f}  regret "
            f"{row.regret[-1]:+.2f}"
        )


@dataclass(frozen=True, slots=True)
class OnlineRow:
    """Holds the results of one learner.

    Attributes:
        variant: Name of the learner in `VARIANTS`; ``frozen`` is the drafter that all start from.
        updates: Number of updates over all steps.
        lengths: Expected acceptance length of the drafter served at each step, on that step's rollouts,
            before it learns from them.
        regret: Cumulative difference of the best fixed drafter's lengths to these, up to each step.
    """

    variant: str
    updates: int
    lengths: list[float]
    regret: list[float]


@dataclass(slots=True)
class _Judge:
    """Judges drafters on a sample of one step's rollouts, with the policy of that step."""

    pieces: list[Piece]
    learner: DrafterLearner

    def length(self, model: Eagle3Model) -> float:
        """Returns the expected acceptance length of a drafter's likeliest drafts."""
        return self.learner.evaluate(self.pieces, model).likeliest_length


class _SideBySide(SharedDrafter):
    """Trains every variant for the same time on the same rollouts, in place of the trainer's drafter."""

    def __init__(
        self,
        config: RunConfig,
        trainer: Trainer,
        start: Eagle3Model,
        seconds: float,
        log: Log,
    ) -> None:
        super().__init__(config, trainer.drafter.local, trainer.accelerator, trainer.run_dir, log)
        self._policy, self._start, self._seconds = trainer.decoded, start, seconds
        self._temperature, self._context = config.rollout.temperature, config.drafter.context_tokens
        self.spots: dict[str, SpotTrainer] = {}
        for name, change in VARIANTS.items():
            changed = replace(config, drafter=change(config.drafter))
            self.spots[name] = spot_trainer(changed, trainer.decoded, start, trace_buffer(changed, rank=0))
        self.judges: list[_Judge] = []
        self.lengths: dict[str, list[float]] = {name: [] for name in ("frozen", *self.spots)}
        self.updates = dict.fromkeys(self.lengths, 0)
        self.fixed = [start]

    def train(self, done: RankRollouts, rewards: Sequence[float], step: int) -> LearnerReport:
        """Judges the served drafters on a step's rollouts, then trains every variant on them.

        Args:
            done: Rollouts of this rank.
            rewards: Not used.
            step: Not used.

        Returns:
            An empty report: the trainer's own drafter is not trained.
        """
        judge = self._judge_of(done)
        self.judges.append(judge)
        self.lengths["frozen"].append(judge.length(self._start))
        for name, spot in self.spots.items():
            self.lengths[name].append(judge.length(spot.serving))
            spot.buffer.begin_step()
            spot.buffer.add(done.rollouts)
            report = spot.run(partial(deadline_passed, time.perf_counter() + self._seconds))
            self.updates[name] += report.updates
            if report.approved:
                spot.adopt([p.detach() for p in spot.approved.parameters()])
            if len(self.judges) % _SNAPSHOT_EVERY == 0:
                self.fixed.append(copy.deepcopy(spot.serving))
        self._log("  ".join(f"{name.split()[0]} {lengths[-1]:.3f}" for name, lengths in self.lengths.items()))
        return LearnerReport()

    def _judge_of(self, done: RankRollouts) -> _Judge:
        buffer = TraceBuffer(previous_steps=0, held_out_every=1)
        buffer.begin_step()
        buffer.add(done.rollouts)
        (pieces,) = buffer.held_out_batches(_JUDGED_TOKENS, 1)
        embed, head = copy.deepcopy(
            (self._policy.get_input_embeddings(), self._policy.get_output_embeddings())
        )
        objective = Objective(unroll=_CHAIN)
        learner = DrafterLearner(
            self._start,
            embed.bfloat16(),
            head.bfloat16(),
            objective,
            lr=1.0,
            temperature=self._temperature,
            autocast=drafter_autocast(self._policy.device),
            context=self._context,
        )
        return _Judge(pieces, learner)


def compare_online(
    config: RunConfig,
    start: Path,
    seconds: float,
    out: Path,
    log: Log,
    on_step: Callable[[list[OnlineRow]], None],
) -> list[OnlineRow]:
    """Trains the recipe's policy in this process; every variant learns after each step's rollouts.

    The fixed drafters compared in hindsight are the one that all start from and that of every variant at
    every sixth step, so the regret is known at the end only.

    Args:
        config: Recipe of the run.
        start: Directory of the initial drafter.
        seconds: Seconds of training per variant and step.
        out: Folder of the run.
        log: Receives a line per step.
        on_step: Called after each step with the rows so far, which have no regret yet.
    """
    frozen = replace(config.drafter, schedule="never", start=None)
    quiet = replace(config, out=str(out), drafter=frozen, measure=replace(config.measure, plain_every=0))
    out.mkdir(parents=True, exist_ok=True)
    accelerator = make_accelerator(quiet, timeout=timedelta(minutes=30))
    with Tracker(quiet, out, active=False) as tracker:
        trainer = Trainer(quiet, out, accelerator, None, tracker)
        runner = trainer.worker.engine.runner
        drafter = load_drafter(
            start, runner.vocab_size, runner.hidden_size, tap_layers=trainer.worker.tap_layers
        )
        trainer.drafter.local.create(None, drafter)
        comparison = _SideBySide(quiet, trainer, drafter, seconds, log)
        trainer.drafter = comparison
        with trainer.scoring:
            for step in range(quiet.steps):
                trainer.step(step)
                on_step(
                    [
                        OnlineRow(name, comparison.updates[name], lengths, [])
                        for name, lengths in comparison.lengths.items()
                    ]
                )
    return _rows(comparison)


def _rows(comparison: _SideBySide) -> list[OnlineRow]:
    totals = [[judge.length(model) for judge in comparison.judges] for model in comparison.fixed]
    best = max(totals, key=sum)
    rows = []
    for name, lengths in comparison.lengths.items():
        regret = (torch.tensor(best) - torch.tensor(lengths)).cumsum(0)
        rows.append(OnlineRow(name, comparison.updates[name], lengths, regret.tolist()))
    return rows
