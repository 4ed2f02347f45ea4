"""The drafter's training in the time in which its rank has nothing to decode."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from paceline.drafter_trainer.ensemble_weights import tracking_weights
from paceline.drafter_trainer.learner import DrafterLearner, first_non_finite
from paceline.drafter_trainer.trace_buffer import Piece, TraceBuffer
from paceline.drafter_trainer.training_time_test import Interrupted, Unrolled
from paceline.rollout.drafters.eagle3_model import Eagle3Model

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
        approved: Updates in weights that did better than the serving ones on what was kept back and wait to
            be served; 0 for none.
        serving_length, candidate_length: Expected acceptance length there, of the serving drafter and of the
            last one judged.
        snapshot_seconds: What a snapshot of the drafter took of the step's time.
        ensemble: Weight of each drafter that is trained, see `tracking_weights`; one weight where there is
            one drafter.
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
    ensemble: list[float] = field(default_factory=list)

    def note(self, outcome: Unrolled, anchors: int) -> None:
        """Adds an update to the means."""
        self.updates += 1
        self.tokens += anchors
        share = 1 / self.updates
        self.loss += share * (float(outcome.loss.detach()) - self.loss)
        before = self.acceptance or [0.0] * len(outcome.acceptance)
        self.acceptance = [a + share * (b - a) for a, b in zip(before, outcome.acceptance, strict=True)]


class SpotTrainer:
    """Trains while it may, and goes on next time where it stopped.

    New weights reach the engines only once they did better on sequences kept back than the serving weights do
    on the same ones (the policy moves, so both are judged anew each step): a bad update never slows rollouts.
    What was approved is a copy; training goes on from the newest weights, until they were clearly worse three
    times in a row: then from the approved ones.

    With several learners every batch goes to each in turn, and what is proposed is the one that has lately
    done best (`tracking_weights`): an ensemble of drafters, as OnlineSpec keeps one (Qian et al., arXiv
    2603.12617).

    Args:
        learners: With the newest weights, and an optimizer each; of the same shape and vocabulary.
        buffer: Traces.
        budget: Anchors of a micro-batch.
        judge_every: Updates between two judgements.
        likeliest: Whether drafts are the likeliest tokens, and not drawn ones: what is judged by.
    """

    def __init__(
        self,
        learners: Sequence[DrafterLearner],
        buffer: TraceBuffer,
        *,
        budget: int,
        judge_every: int = 8,
        likeliest: bool = True,
    ) -> None:
        self.learners, self.buffer = learners, buffer
        self._budget, self._judge_every, self._likeliest = budget, judge_every, likeliest
        self.replace_model()

    def replace_model(self) -> None:
        """Serves the learners' model as it is: at the start, and when it has got another draft vocabulary."""
        self.weights = [1 / len(self.learners)] * len(self.learners)
        self.serving, self.approved = _frozen_copy(self.learner.model), _frozen_copy(self.learner.model)
        self._unjudged = self._unserved = self._proposed = 0
        self._worse = [0] * len(self.learners)

    @property
    def learner(self) -> DrafterLearner:
        """The one that has lately done best."""
        return self.learners[self._best]

    @property
    def _best(self) -> int:
        return self.weights.index(max(self.weights))

    def run(self, stop: Callable[[], bool]) -> LearnerReport:
        """Trains until ``stop()`` or until this step's passes are through.

        ``stop`` is asked before every micro-batch, judged or trained on, and in training at every draft
        position, forward and back. Within a step, a micro-batch that was broken off comes first next time.
        """
        report = LearnerReport()
        started = time.perf_counter()
        self._train(report, stop)
        report.approved, report.ensemble = self._proposed, list(self.weights)
        report.seconds = time.perf_counter() - started
        return report

    def _train(self, report: LearnerReport, stop: Callable[[], bool]) -> None:
        # judged anew in every stretch, once there is something to compare it with
        serving: torch.Tensor | None = None
        while not stop():
            pieces = self.buffer.next_batch(self._budget) if self._unjudged < self._judge_every else None
            if pieces is None:
                serving = self._judge(self.serving, stop) if serving is None and self._unjudged else serving
                if serving is None or not self._unjudged or not self._approve(report, serving, stop):
                    return
                continue
            try:
                updated = self._learn(pieces, report, stop)
            except Interrupted:
                self.buffer.put_back(pieces)
                return
            if updated:
                self._unjudged += 1
                self._unserved += 1

    def _learn(self, pieces: Sequence[Piece], report: LearnerReport, stop: Callable[[], bool]) -> bool:
        """An update of every learner, in turns of who is first; those not reached when it must stop leave the
        batch out.

        Raises:
            Interrupted: when the first had to stop.
        """
        weights = [self.buffer.weight(p.entry) for p in pieces]
        first, updated = self._unserved % len(self.learners), False
        for learner in (*self.learners[first:], *self.learners[:first]):
            try:
                outcome = learner.update(pieces, weights, stop)
            except Interrupted:
                if updated:
                    break
                raise
            if outcome is None:
                report.skipped += 1
                continue
            report.note(outcome, sum(p.end - p.begin for p in pieces))
            updated = True
        return updated

    def _judge(self, model: Eagle3Model, stop: Callable[[], bool]) -> torch.Tensor | None:
        """Expected acceptance length of each sequence kept back; empty without any, None when told to
        stop.
        """
        judged = []
        for pieces in self.buffer.held_out_batches(self._budget, _JUDGED):
            if stop():
                return None
            drawn, likeliest = self.learner.evaluate(pieces, model).by_piece
            judged.append((likeliest if self._likeliest else drawn).cpu())
        return torch.cat(judged) if judged else torch.zeros(0)

    def _approve(self, report: LearnerReport, serving: torch.Tensor, stop: Callable[[], bool]) -> bool:
        """Judges the newest weights. Returns whether there was time for it."""
        candidates = []
        self._mend()
        for learner in self.learners:
            judged = self._judge(learner.model, stop)
            if judged is None:
                return False
            candidates.append(judged)
        self._unjudged = 0
        report.serving_length = _mean(serving)
        lengths = [_mean(judged) for judged in candidates]
        self.weights = tracking_weights(self.weights, lengths)
        report.candidate_length = lengths[self._best]
        better = report.candidate_length > report.serving_length or not len(serving)
        if better:
            _copy_weights(self.learner.model, self.approved)
            self._proposed = self._unserved
        for number, judged in enumerate(candidates):
            if better and number == self._best:
                self._worse[number] = 0
            else:
                self._hold_against(number, judged - serving)
        return True

    def _mend(self) -> None:
        """A learner whose weights are not finite any more goes on from the approved ones, with an optimizer
        that has seen
        nothing: its moments would spoil them again.
        """
        for learner in self.learners:
            if first_non_finite(learner.model) is not None:
                learner.start_over(self.approved)

    def forget_approved(self) -> None:
        """What was approved turned out to be unusable: all learners go on from the serving weights."""
        _copy_weights(self.serving, self.approved)
        for learner in self.learners:
            learner.start_over(self.serving)
        self._proposed = self._unserved = self._unjudged = 0

    def _hold_against(self, number: int, differences: torch.Tensor) -> None:
        """A learner that was worse three times in a row goes on from the approved weights. A judgement of a
        few sequences is
        uncertain: only what is worse by two standard errors counts.
        """
        differences = differences[differences.isfinite()]
        certain = 2 * float(differences.std()) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
        self._worse[number] = self._worse[number] + 1 if float(differences.mean()) < -certain else 0
        if self._worse[number] == _PATIENCE:
            _copy_weights(self.approved, self.learners[number].model)
            self._worse[number] = 0
            if number == self._best:
                self._unserved = self._proposed

    @torch.no_grad()
    def adopt(self, tensors: Sequence[torch.Tensor]) -> None:
        """All ranks' approved weights, averaged, are served from now on; this rank's newer updates go on from
        there.

        Args:
            tensors: In the order of the model's parameters.
        """
        newest = zip(*(learner.model.parameters() for learner in self.learners), strict=True)
        for served, approved, own, mean in zip(
            self.serving.parameters(), self.approved.parameters(), newest, tensors, strict=True
        ):
            change = mean - approved
            for parameter in own:
                parameter.add_(change)
            approved.copy_(mean)
            served.copy_(mean)
        self._proposed, self._unserved = 0, self._unjudged


def _mean(by_piece: torch.Tensor) -> float:
    finite = by_piece[by_piece.isfinite()]
    return float(finite.mean()) if len(finite) else 0.0


def _frozen_copy(model: Eagle3Model) -> Eagle3Model:
    return copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def _copy_weights(source: Eagle3Model, target: Eagle3Model) -> None:
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        b.copy_(a)
