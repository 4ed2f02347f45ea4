"""The drafter's training in the time in which its rank has nothing to decode."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from drafter_trainer.buffer import TraceBuffer
from drafter_trainer.learner import DrafterLearner
from drafter_trainer.unroll import Unrolled
from rollout.drafters.eagle3_model import Eagle3Model

_JUDGED = 4  # micro-batches that judge a drafter
_PATIENCE = 3


@dataclass(slots=True)
class LearnerReport:
    """One stretch of training.

    Attributes:
        updates: Optimizer steps.
        tokens: Anchors seen.
        loss: Mean loss.
        acceptance: Expected acceptance Σ min(p, q) at each draft position, mean over updates.
        seconds: Wall time.
        skipped: Micro-batches left out because their loss was not finite.
        approved: Updates in weights that did better than the serving ones on what was kept back and wait to be served; 0 for none.
        serving_length, candidate_length: Expected acceptance length there, of the serving drafter and of the last one judged.
        snapshot_seconds: What a snapshot of the drafter took of the step's time.
    """

    updates: int = 0
    tokens: int = 0
    loss: float = 0.0
    acceptance: list[float] = field(default_factory=list)
    seconds: float = 0.0
    skipped: int = 0
    approved: int = 0
    serving_length: float = 0.0
    candidate_length: float = 0.0
    snapshot_seconds: float = 0.0

    def note(self, outcome: Unrolled, anchors: int) -> None:
        """Adds an update to the means."""
        self.updates += 1
        self.tokens += anchors
        share = 1 / self.updates
        self.loss += share * (float(outcome.loss.detach()) - self.loss)
        before = self.acceptance or [0.0] * len(outcome.acceptance)
        self.acceptance = [a + share * (b - a) for a, b in zip(before, outcome.acceptance, strict=True)]


class SpotTrainer:
    """Trains while it may, one micro-batch at a time, and goes on next time where it stopped.

    New weights reach the engines only once they did better on sequences kept back than the serving weights do on the same ones (the
    policy moves, so both are judged anew each step): a bad update never slows rollouts. What was approved is a copy; training goes
    on from the newest weights, until they were clearly worse three times in a row: then from the approved ones.

    Args:
        learner: With the newest weights.
        buffer: Traces.
        budget: Anchors of a micro-batch: what a stop may have to wait for.
        judge_every: Updates between two judgements.
        likeliest: Whether drafts are the likeliest tokens, and not drawn ones: what is judged by.
    """

    def __init__(
        self, learner: DrafterLearner, buffer: TraceBuffer, *, budget: int, judge_every: int = 8, likeliest: bool = True
    ) -> None:
        self.learner, self.buffer = learner, buffer
        self._budget, self._judge_every, self._likeliest = budget, judge_every, likeliest
        self.serving = _frozen_copy(learner.model)
        self.approved = _frozen_copy(learner.model)
        self._unjudged = self._unserved = self._proposed = self._worse = 0

    def run(self, stop: Callable[[], bool]) -> LearnerReport:
        """Trains until ``stop()`` or until this step's passes are through. ``stop`` is asked before every micro-batch, judged or
        trained on."""
        report = LearnerReport()
        started = time.perf_counter()
        serving = self._judge(self.serving, stop)
        if serving is not None:
            report.serving_length = _mean(serving)
            self._train(report, serving, stop)
        report.approved = self._proposed
        report.seconds = time.perf_counter() - started
        return report

    def _train(self, report: LearnerReport, serving: torch.Tensor, stop: Callable[[], bool]) -> None:
        while not stop():
            pieces = self.buffer.next_batch(self._budget) if self._unjudged < self._judge_every else None
            if pieces is None:
                if not self._unjudged or not self._approve(report, serving, stop):
                    return
                continue
            outcome = self.learner.update(pieces, [self.buffer.weight(p.entry) for p in pieces])
            if outcome is None:
                report.skipped += 1
                continue
            report.note(outcome, sum(p.end - p.begin for p in pieces))
            self._unjudged += 1
            self._unserved += 1

    def _judge(self, model: Eagle3Model, stop: Callable[[], bool]) -> torch.Tensor | None:
        """Expected acceptance length of each sequence kept back; empty without any, None when told to stop."""
        judged = [torch.zeros(0)]
        for pieces in self.buffer.held_out_batches(self._budget, _JUDGED):
            if stop():
                return None
            drawn, likeliest = self.learner.evaluate(pieces, model).by_piece
            judged.append(likeliest if self._likeliest else drawn)
        return torch.cat(judged)

    def _approve(self, report: LearnerReport, serving: torch.Tensor, stop: Callable[[], bool]) -> bool:
        """Judges the newest weights. Returns whether there was time for it."""
        candidate = self._judge(self.learner.model, stop)
        if candidate is None:
            return False
        self._unjudged = 0
        report.candidate_length = _mean(candidate)
        if report.candidate_length > report.serving_length or not len(candidate):
            _copy_weights(self.learner.model, self.approved)
            self._proposed, self._worse = self._unserved, 0
            return True
        # a judgement of a few sequences is uncertain: only what is worse by two standard errors is held against the newest weights
        differences = (candidate - serving)[candidate.isfinite()]
        certain = 2 * float(differences.std()) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
        self._worse = self._worse + 1 if float(differences.mean()) < -certain else 0
        if self._worse == _PATIENCE:
            _copy_weights(self.approved, self.learner.model)
            self._worse, self._unserved = 0, self._proposed
        return True

    @torch.no_grad()
    def adopt(self, tensors: Sequence[torch.Tensor]) -> None:
        """All ranks' approved weights, averaged, are served from now on; this rank's newer updates go on from there.

        Args:
            tensors: In the order of the model's parameters.
        """
        for served, approved, newest, mean in zip(
            self.serving.parameters(), self.approved.parameters(), self.learner.model.parameters(), tensors, strict=True
        ):
            newest.add_(mean - approved)
            approved.copy_(mean)
            served.copy_(mean)
        self._proposed, self._unserved = 0, self._unjudged

    def replace_model(self) -> None:
        """The learner's model has another draft vocabulary: it is served as it is."""
        self.serving, self.approved = _frozen_copy(self.learner.model), _frozen_copy(self.learner.model)
        self._unjudged = self._unserved = self._proposed = 0


def _mean(by_piece: torch.Tensor) -> float:
    finite = by_piece[by_piece.isfinite()]
    return float(finite.mean()) if len(finite) else 0.0


def _frozen_copy(model: Eagle3Model) -> Eagle3Model:
    return copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def _copy_weights(source: Eagle3Model, target: Eagle3Model) -> None:
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        b.copy_(a)
