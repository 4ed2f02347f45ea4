"""Drafters that learn online on one moving policy, and what each loses against the best fixed drafter in
hindsight.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch

from paceline.benchmarks.common.runs import is_over
from paceline.drafter_trainer.learner import DrafterLearner
from paceline.drafter_trainer.spot_trainer import LearnerReport, SpotTrainer
from paceline.drafter_trainer.storage.checkpoint import load_drafter
from paceline.drafter_trainer.trace_buffer import Piece, TraceBuffer
from paceline.drafter_trainer.training_time_test import Objective
from paceline.rl.config.drafter import DrafterConfig
from paceline.rl.config.run import RunConfig
from paceline.rl.drafting.factory import spot_trainer, trace_buffer
from paceline.rl.drafting.shared import SharedDrafter
from paceline.rl.monitoring.tracker import Tracker
from paceline.rl.trainer import Trainer, make_accelerator
from paceline.rl.types import RankRollouts
from paceline.rollout.drafters.eagle3_model import Eagle3Model

VARIANTS: dict[str, Callable[[DrafterConfig], DrafterConfig]] = {
    "AdamW": lambda d: d,
    "optimistic": lambda d: replace(d, optimistic=True),
    "verification feedback only": lambda d: replace(d, feedback_only=True),
    "ensemble of 0.3, 1 and 3 times the learning rate": lambda d: replace(d, ensemble=(0.3, 1.0, 3.0)),
}
_CHAIN = 4
_JUDGED_TOKENS = 512
_SNAPSHOT_EVERY = 6


@dataclass(frozen=True, slots=True)
class OnlineRow:
    """One way to learn.

    Attributes:
        variant: Its name; ``frozen`` is the drafter that all start from.
        updates: Over all steps.
        lengths: Expected acceptance length of the drafter served at each step, on that step's rollouts,
            before it learns from them.
        regret: Of the steps up to each one: the best fixed drafter's lengths less these, summed.
    """

    variant: str
    updates: int
    lengths: list[float]
    regret: list[float]


@dataclass(slots=True)
class _Judge:
    """A step's rollouts, some of them, with the policy as it was then."""

    pieces: list[Piece]
    learner: DrafterLearner

    def length(self, model: Eagle3Model) -> float:
        return self.learner.evaluate(self.pieces, model).likeliest_length


class _SideBySide(SharedDrafter):
    """Gives every variant the same time on the same rollouts."""

    def __init__(
        self,
        config: RunConfig,
        trainer: Trainer,
        start: Eagle3Model,
        seconds: float,
        say: Callable[[str], None],
    ) -> None:
        super().__init__(config, trainer.drafter.local, trainer.accelerator, trainer.run_dir, say)
        self._policy, self._start, self._seconds = trainer.decoded, start, seconds
        self._temperature = config.rollout.temperature
        self.spots: dict[str, SpotTrainer] = {}
        for name, change in VARIANTS.items():
            changed = replace(config, drafter=change(config.drafter))
            self.spots[name] = spot_trainer(changed, trainer.decoded, start, trace_buffer(changed, rank=0))
        self.judges: list[_Judge] = []
        self.lengths: dict[str, list[float]] = {name: [] for name in ("frozen", *self.spots)}
        self.updates = dict.fromkeys(self.lengths, 0)
        self.fixed = [start]

    def train(self, done: RankRollouts, rewards: Sequence[float], step: int) -> LearnerReport:
        judge = self._judge_of(done)
        self.judges.append(judge)
        self.lengths["frozen"].append(judge.length(self._start))
        for name, spot in self.spots.items():
            self.lengths[name].append(judge.length(spot.serving))
            spot.buffer.begin_step()
            spot.buffer.add(done.rollouts)
            report = spot.run(partial(is_over, time.perf_counter() + self._seconds))
            self.updates[name] += report.updates
            if report.approved:
                spot.adopt([p.detach() for p in spot.approved.parameters()])
            if len(self.judges) % _SNAPSHOT_EVERY == 0:
                self.fixed.append(copy.deepcopy(spot.serving))
        self._say("  ".join(f"{name.split()[0]} {lengths[-1]:.3f}" for name, lengths in self.lengths.items()))
        return LearnerReport()

    def _judge_of(self, done: RankRollouts) -> _Judge:
        buffer = TraceBuffer(previous_steps=0, held_out_every=1)
        buffer.begin_step()
        buffer.add(done.rollouts)
        (pieces,) = buffer.held_out_batches(_JUDGED_TOKENS, 1)
        embed, head = copy.deepcopy(
            (self._policy.get_input_embeddings(), self._policy.get_output_embeddings())
        )
        autocast = partial(torch.autocast, self._policy.device.type, dtype=torch.bfloat16)
        objective = Objective(unroll=_CHAIN)
        learner = DrafterLearner(
            self._start,
            embed.bfloat16(),
            head.bfloat16(),
            objective,
            lr=1.0,
            temperature=self._temperature,
            autocast=autocast,
        )
        return _Judge(pieces, learner)


def compare_online(
    config: RunConfig,
    start: Path,
    seconds: float,
    out: Path,
    say: Callable[[str], None],
    keep: Callable[[list[OnlineRow]], None],
) -> list[OnlineRow]:
    """Trains the recipe's policy in this process; after each step's rollouts every variant learns for
    ``seconds``.

    Fixed drafters in hindsight are the one all start from and every variant's, every six steps: only at the
    end is there a regret. Until then ``keep`` gets the rows without it after each step.
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
        comparison = _SideBySide(quiet, trainer, drafter, seconds, say)
        trainer.drafter = comparison
        with trainer.scoring:
            for step in range(quiet.steps):
                trainer.step(step)
                keep(
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
        lost = torch.tensor(best) - torch.tensor(lengths)
        rows.append(OnlineRow(name, comparison.updates[name], lengths, lost.cumsum(0).tolist()))
    return rows
