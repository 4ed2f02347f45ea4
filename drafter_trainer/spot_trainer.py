"""Trains the drafter in the time in which its rank has nothing to decode."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from paceline.drafter_trainer.ensemble_weights import tracking_weights
from paceline.drafter_trainer.learner import DrafterLearner, first_non_finite
from paceline.drafter_trainer.objective.draft_objective import Interrupted, Unrolled
from paceline.drafter_trainer.storage.ensemble import EnsembleState
from paceline.drafter_trainer.storage.optimizer_state import check_moments, take_over_moments
from paceline.drafter_trainer.trace_buffer import Piece, TraceBuffer
from paceline.rollout.drafters.eagle3_model import Eagle3Model

_HELD_OUT_BATCHES = 4  # bounds the time of one evaluation
_MAX_WORSE_IN_A_ROW = 3  # evaluations after which a learner is reset to the approved weights


@dataclass(slots=True)
class LearnerReport:
    """Statistics of one training interval.

    Attributes:
        updates: Number of optimizer steps.
        tokens: Number of anchors trained on.
        loss: Mean loss.
        acceptance: Expected acceptance Σ min(p, q) at each draft position, mean over updates.
        seconds: Wall time, pauses included.
        skipped: Number of micro-batches skipped because their loss was not finite.
        approved: Number of updates in the approved weights, which beat the serving ones on held-out sequences
            and wait to be served; 0 if there are none.
        serving_length: Expected acceptance length of the serving drafter on held-out sequences.
        candidate_length: Expected acceptance length of the last evaluated candidate on them.
        snapshot_seconds: Time of the step that a snapshot of the drafter took.
        ensemble: Weight of each drafter of the ensemble, see `tracking_weights`; a single one without an
            ensemble.
        slowdown: Share by which training slows decode steps on the same machine; None if it is not known.
        slowdown_error: Its standard error.
        held_back_seconds: Time in which training paused, or had ended because of the slowdown while other
            ranks still decoded.
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
    slowdown: float | None = None
    slowdown_error: float = 0.0
    held_back_seconds: float = 0.0

    def note(self, outcome: Unrolled, anchors: int) -> None:
        """Adds one update over ``anchors`` anchors to the means."""
        self.updates += 1
        self.tokens += anchors
        share = 1 / self.updates
        self.loss += share * (float(outcome.loss.detach()) - self.loss)
        previous = self.acceptance or [0.0] * len(outcome.acceptance)
        self.acceptance = [a + share * (b - a) for a, b in zip(previous, outcome.acceptance, strict=True)]


class SpotTrainer:
    """Trains the drafter while there is idle time, and resumes next time where it stopped.

    New weights reach the engines only once they have beaten the serving weights on the same held-out
    sequences, so that a bad update never slows rollouts. Both are evaluated again in each step, because the
    policy changes. Approved weights are a copy: training continues from the newest weights. Only after a
    learner has been clearly worse three times in a row does it continue from the approved ones.

    With several learners, every batch is trained on by each of them, and the one that has recently done best
    (`tracking_weights`) is proposed. This is the ensemble of drafters of OnlineSpec (Qian et al., arXiv
    2603.12617).

    Args:
        learners: Learners with the newest weights and an optimizer each; all of one shape and vocabulary.
        buffer: Traces to train on.
        budget: Number of anchors of a micro-batch.
        judge_every: Number of updates between two evaluations.
        likeliest: Whether the engine drafts the likeliest tokens instead of sampling them, which decides the
            acceptance length that is compared.
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
        """Serves the learners' model as it is: at the start, and after its draft vocabulary has changed."""
        self.weights = [1 / len(self.learners)] * len(self.learners)
        self.serving, self.approved = _frozen_copy(self.learner.model), _frozen_copy(self.learner.model)
        self._unevaluated = self._unserved = self._proposed = 0
        self._worse = [0] * len(self.learners)

    @property
    def learner(self) -> DrafterLearner:
        """The learner that has recently done best."""
        return self.learners[self._best]

    @property
    def _best(self) -> int:
        return self.weights.index(max(self.weights))

    def run(self, stop: Callable[[], bool]) -> LearnerReport:
        """Trains until ``stop()`` returns True or this step's passes over the buffer are complete.

        ``stop`` is called before every micro-batch of training or evaluation and, in training, at every draft
        position of the forward and the backward pass. A micro-batch that was interrupted comes first in the
        next call of the same step.
        """
        report = LearnerReport()
        start = time.perf_counter()
        self._train(report, stop)
        report.approved, report.ensemble = self._proposed, list(self.weights)
        report.seconds = time.perf_counter() - start
        return report

    def _train(self, report: LearnerReport, stop: Callable[[], bool]) -> None:
        # evaluated once per run, and only when there is a candidate to compare it with
        serving: torch.Tensor | None = None
        while not stop():
            pieces = self.buffer.next_batch(self._budget) if self._unevaluated < self._judge_every else None
            if pieces is None:
                serving = (
                    self._evaluate(self.serving, stop) if serving is None and self._unevaluated else serving
                )
                if serving is None or not self._unevaluated or not self._approve(report, serving, stop):
                    return
                continue
            try:
                updated = self._learn(pieces, report, stop)
            except Interrupted:
                self.buffer.put_back(pieces)
                return
            if updated:
                self._unevaluated += 1
                self._unserved += 1

    def _learn(self, pieces: Sequence[Piece], report: LearnerReport, stop: Callable[[], bool]) -> bool:
        """Updates every learner on one batch and returns whether any was updated.

        Which learner is first rotates. If training must stop after one was updated, the rest skip the batch.

        Raises:
            Interrupted: Training had to stop before any learner was updated.
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

    def _evaluate(self, model: Eagle3Model, stop: Callable[[], bool]) -> torch.Tensor | None:
        """Returns the expected acceptance length of each held-out piece, float32 [P].

        It is empty if nothing is held out. None means that ``stop`` interrupted the evaluation.
        """
        lengths = []
        for pieces in self.buffer.held_out_batches(self._budget, _HELD_OUT_BATCHES):
            if stop():
                return None
            sampled, likeliest = self.learner.evaluate(pieces, model).by_piece
            lengths.append((likeliest if self._likeliest else sampled).cpu())
        return torch.cat(lengths) if lengths else torch.zeros(0)

    def _approve(self, report: LearnerReport, serving: torch.Tensor, stop: Callable[[], bool]) -> bool:
        """Evaluates the newest weights and approves them if they are better; returns False if interrupted."""
        candidates = []
        self._reset_non_finite()
        for learner in self.learners:
            evaluated = self._evaluate(learner.model, stop)
            if evaluated is None:
                return False
            candidates.append(evaluated)
        self._unevaluated = 0
        report.serving_length = _mean(serving)
        lengths = [_mean(evaluated) for evaluated in candidates]
        self.weights = tracking_weights(self.weights, lengths)
        report.candidate_length = lengths[self._best]
        better = report.candidate_length > report.serving_length or not len(serving)
        if better:
            _copy_weights(self.learner.model, self.approved)
            self._proposed = self._unserved
        for number, evaluated in enumerate(candidates):
            if better and number == self._best:
                self._worse[number] = 0
            else:
                self._count_worse(number, evaluated - serving)
        return True

    def _reset_non_finite(self) -> None:
        """Resets learners whose weights are not finite to the approved weights.

        Their optimizers are cleared too, because the moments would make the weights non-finite again.
        """
        for learner in self.learners:
            if first_non_finite(learner.model) is not None:
                learner.start_over(self.approved)

    def forget_approved(self) -> None:
        """Continues with all learners from the serving weights.

        Called when the approved weights turn out to be unusable.
        """
        _copy_weights(self.serving, self.approved)
        for learner in self.learners:
            learner.start_over(self.serving)
        self._proposed = self._unserved = self._unevaluated = 0

    def _count_worse(self, number: int, differences: torch.Tensor) -> None:
        """Resets a learner that was worse three times in a row to the approved weights.

        An evaluation on a few sequences is noisy, so only a difference of more than two standard errors
        counts.

        Args:
            number: Index of the learner.
            differences: float32 [P], acceptance length of each held-out piece less that of the serving
                weights.
        """
        differences = differences[differences.isfinite()]
        margin = 2 * float(differences.std()) / len(differences) ** 0.5 if len(differences) > 1 else 0.0
        self._worse[number] = self._worse[number] + 1 if float(differences.mean()) < -margin else 0
        if self._worse[number] == _MAX_WORSE_IN_A_ROW:
            _copy_weights(self.approved, self.learners[number].model)
            self._worse[number] = 0
            if number == self._best:
                self._unserved = self._proposed

    def ensemble(self) -> EnsembleState | None:
        """Returns what the learners have learned, not copied; None for a single learner."""
        if len(self.learners) == 1:
            return None
        return EnsembleState(
            self.weights,
            [learner.model for learner in self.learners],
            [learner.optimizer.state_dict() for learner in self.learners],
        )

    def restore(self, state: EnsembleState) -> None:
        """Continues with the learners of `ensemble`, whose weights are newer than the serving ones.

        Raises:
            ValueError: They are of another number, shape or draft vocabulary; nothing has changed.
        """
        if len(state.models) != len(self.learners):
            raise ValueError(
                f"it has {len(state.models)} drafters, drafter.ensemble has {len(self.learners)}"
            )
        shapes = [p.shape for p in self.serving.parameters()]
        for model, optimizer in zip(state.models, state.optimizers, strict=True):
            if not torch.equal(model.vocabulary.cpu(), self.serving.vocabulary.cpu()):
                raise ValueError("its drafters draft other tokens than the one that is served")
            if [p.shape for p in model.parameters()] != shapes:
                raise ValueError("its drafters are of another shape than the one that is served")
            check_moments(optimizer["state"], shapes)
        for learner, model, optimizer in zip(self.learners, state.models, state.optimizers, strict=True):
            take_over_moments(learner.optimizer, optimizer)
            learner.scale_rate(1.0)
            _copy_weights(model, learner.model)
        self.weights = list(state.weights)

    @torch.no_grad()
    def adopt(self, tensors: Sequence[torch.Tensor]) -> None:
        """Serves the average of all ranks' approved weights.

        The difference is also added to the learners' weights, so that this rank's newer updates are kept.

        Args:
            tensors: Averaged parameters, in the order of the model's parameters.
        """
        parameters = zip(*(learner.model.parameters() for learner in self.learners), strict=True)
        for served, approved, copies, mean in zip(
            self.serving.parameters(), self.approved.parameters(), parameters, tensors, strict=True
        ):
            change = mean - approved
            for parameter in copies:
                parameter.add_(change)
            approved.copy_(mean)
            served.copy_(mean)
        self._proposed, self._unserved = 0, self._unevaluated


def _mean(by_piece: torch.Tensor) -> float:
    finite = by_piece[by_piece.isfinite()]
    return float(finite.mean()) if len(finite) else 0.0


def _frozen_copy(model: Eagle3Model) -> Eagle3Model:
    return copy.deepcopy(model).requires_grad_(False)


@torch.no_grad()
def _copy_weights(source: Eagle3Model, target: Eagle3Model) -> None:
    for a, b in zip(source.parameters(), target.parameters(), strict=True):
        b.copy_(a)
