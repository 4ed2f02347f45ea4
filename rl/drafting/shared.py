"""The ranks' one drafter over a run: trained where they idle, averaged between steps, restored after a
stop.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from paceline.drafter_trainer.coordinator import Coordinator, connect_store
from paceline.drafter_trainer.errors import DrafterError, OptimizerStateError
from paceline.drafter_trainer.spot_trainer import LearnerReport
from paceline.drafter_trainer.storage.checkpoint import load_drafter
from paceline.drafter_trainer.storage.snapshots import DrafterSnapshots
from paceline.drafter_trainer.vocabulary import choose_vocabulary
from paceline.rl.algorithms.lr_schedule import rate_at
from paceline.rl.checkpointing.checkpoint import Checkpoint
from paceline.rl.config.run import RunConfig
from paceline.rl.drafting.rank_drafter import RankDrafter
from paceline.rl.errors import UserError
from paceline.rl.models.initial import starting_drafter
from paceline.rl.types import RankRollouts
from paceline.rollout.drafters.eagle3_model import Eagle3Model


class SharedDrafter:
    """One rank's part in the drafter that all ranks share.

    A drafter that cannot be read costs acceptance, never the run: after a stop it is passed over with one
    line, and the run goes on from ``drafter.start``, or with a new one that is made after the next step's
    rollouts.

    Args:
        config: The recipe.
        local: This rank's drafter.
        accelerator: Of this process.
        run: The run's directory.
        say: Where one line about a problem goes.
    """

    def __init__(
        self,
        config: RunConfig,
        local: RankDrafter,
        accelerator: Accelerator,
        run: Path,
        say: Callable[[str], None],
    ) -> None:
        self._run_config, self._config, self._steps = config, config.drafter, config.steps
        self.local, self._accelerator, self._say = local, accelerator, say
        ranks = accelerator.num_processes
        self.coordinator = Coordinator(connect_store(ranks), ranks, self._config.least_idle_ranks)
        self._snapshots = DrafterSnapshots(run / "drafters", self._config.snapshots)

    def begin_step(self, step: int) -> None:
        """Tells the other ranks that this rank is decoding."""
        self.coordinator.begin(step)

    def beat(self) -> None:
        """Tells the other ranks that this rank is alive; called after each decode step."""
        self.coordinator.beat()

    def start(self) -> None:
        """Begins with ``drafter.start``, and with its optimizer's state where that is there.

        Raises:
            UserError: where it cannot be used.
        """
        if not self.local.missing:
            return
        model = starting_drafter(self._run_config, self.local.policy_config)
        if model is None:
            return
        self.local.create(None, model)
        moments = Path(str(self._config.start)) / "optimizer"
        if moments.with_suffix(".json").is_file():
            try:
                self._restore_moments(moments)
            except OptimizerStateError as error:
                raise UserError(f"drafter.start: {error}; delete {moments}.* to begin without it") from None

    def resume(self, checkpoint: Checkpoint) -> None:
        """Goes on with the newest whole snapshot, also one made after the checkpoint (a drafter that is ahead
        costs acceptance at most); else with the checkpoint's own, or ``drafter.start``. Where none can be
        read a new one is made, and a line says so. Collective.
        """
        if not self.local.missing:
            return
        found = self._newest(checkpoint)
        names = gather_object([None if found is None else str(found[1])])
        if len(set(names)) > 1:
            self._tell("ranks cannot read the same one; a fresh one is made")
            return
        if found is None:
            return
        model, moments = found
        self.local.create(None, model)
        if moments is None or (
            "drafter_optimizer" in checkpoint.broken and moments.parent == checkpoint.path
        ):
            return
        try:
            self._restore_moments(moments)
        except OptimizerStateError as error:
            self._tell(f"{error}; its optimizer begins anew")

    def _newest(self, checkpoint: Checkpoint) -> tuple[Eagle3Model, Path | None] | None:
        """A drafter and where its optimizer's state lies."""
        runner = self.local.runner
        wanted: dict[str, Any] = {
            "tap_layers": self.local.tap_layers,
            "draft_vocab_size": self._config.draft_vocab_size,
        }
        found, problems = self._snapshots.newest(runner.vocab_size, runner.hidden_size, **wanted)
        for problem in problems:
            self._tell(problem)
        if found is not None and found[0] >= checkpoint.steps_done:
            return found[2], found[1] / "optimizer"
        kept = checkpoint.path / "drafter"
        if "drafter" not in checkpoint.broken:
            if not kept.is_dir():
                return None  # the run had none yet
            try:
                model = load_drafter(kept, runner.vocab_size, runner.hidden_size, **wanted)
                return model, checkpoint.path / "drafter_optimizer"
            except DrafterError as error:
                self._tell(str(error))
        return self._begun_again()

    def _begun_again(self) -> tuple[Eagle3Model, None] | None:
        """The drafter that the run began from; None, and a line, where there is none."""
        model: Eagle3Model | None = None
        try:
            model = starting_drafter(self._run_config, self.local.policy_config)
        except UserError as error:
            self._tell(str(error))
        if model is None:
            self._tell("a fresh one is made")
            return None
        self._tell(f"it begins again from {self._config.start}")
        return model, None

    def _restore_moments(self, stem: Path) -> None:
        for learner in self.local.learners:
            learner.restore(stem)

    def train(self, batch: RankRollouts, rewards: Sequence[float], step: int) -> LearnerReport:
        """This rank has finished its rollouts: training while others decode, or for whole passes, as the
        recipe has it.

        Args:
            batch: This step's rollouts.
            rewards: Of each.
            step: Of the run, for the learning rate.
        """
        self.coordinator.idle()
        for learner in self.local.learners:
            learner.scale_rate(rate_at(step, self._steps, 1, self._config.lr_schedule))
        self.local.learn_from(batch, rewards)
        if self._config.schedule == "never":
            return LearnerReport()
        if self._config.schedule == "always":
            return self.local.train(lambda: False)
        self.coordinator.wait_until_training()
        report = self.local.train(lambda: not self.coordinator.may_train())
        self._tell(self.coordinator.take_problem())
        return report

    def share(self, batch: RankRollouts, report: LearnerReport, step: int) -> None:
        """Lets every rank draft with the mean of the weights that ranks have approved, weighted by the
        updates in them. The first step's rollouts choose the vocabulary. Collective.

        Args:
            batch: This step's rollouts.
            report: This step's training; what its snapshot took is noted there.
            step: Index of the step.
        """
        if self.local.missing:
            self.local.create(self._vocabulary_of(batch))
            return
        spot = self.local.spot
        if spot is None:
            return
        updates = sum(gather_object([report.approved]))
        if updates:
            share = report.approved / updates
            mean = [self._accelerator.reduce(p.detach() * share, "sum") for p in spot.approved.parameters()]
            if all(bool(tensor.isfinite().all()) for tensor in mean):
                spot.adopt(mean)
            else:
                self._tell("what was trained has NaN or infinite values; the last good drafter stays in use")
                spot.forget_approved()
        every = self._config.vocabulary_every
        anew = every > 0 and (step + 1) % every == 0
        if anew:
            self.local.change_vocabulary(self._vocabulary_of(batch))
        if not updates and not anew:
            return
        self._tell(self.local.swap_in())
        if self._accelerator.is_main_process and self._config.snapshots:
            self._tell(self._snapshots.save(step + 1, spot.serving, spot.learner.optimizer))
            report.snapshot_seconds = self._snapshots.seconds

    def _vocabulary_of(self, batch: RankRollouts) -> torch.Tensor:
        """The draft vocabulary that serves all ranks' rollouts of this step best."""
        everywhere = gather_object([[*r.request.prompt_ids, *r.token_ids] for r in batch.rollouts])
        return choose_vocabulary(everywhere, self._config.draft_vocab_size, self.local.runner.vocab_size)

    def finish(self) -> None:
        """Returns once nothing is being written any more."""
        self._tell(self._snapshots.wait())

    def _tell(self, problem: str | None) -> None:
        if problem is not None:
            self._say(f"drafter: {problem}")
