"""The ranks' one drafter over a run: trained where they idle, averaged between steps, restored after a stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from drafter_trainer.checkpoint import DrafterError, load_drafter
from drafter_trainer.coordinator import Coordinator, connect_store
from drafter_trainer.optimizer_state import OptimizerStateError
from drafter_trainer.snapshots import DrafterSnapshots
from drafter_trainer.spot import LearnerReport
from drafter_trainer.vocabulary import choose_vocabulary
from rl.config import RunConfig
from rl.errors import UserError
from rl.groups import RankRollouts
from rl.rollouts import RolloutWorker
from rl.run_state import Checkpoint
from rl.schedules import rate_at
from rollout.drafters.eagle3_model import Eagle3Model


class SharedDrafter:
    """One rank's side of it.

    A drafter that cannot be read costs acceptance, never the run: after a stop it is passed over with one line, and a fresh one is
    made after the next step's rollouts.

    Args:
        config: The recipe.
        worker: This rank's engine and spot trainer.
        accelerator: Of this process.
        run: The run's directory.
        say: Where one line about a problem goes.
    """

    def __init__(
        self, config: RunConfig, worker: RolloutWorker, accelerator: Accelerator, run: Path, say: Callable[[str], None]
    ) -> None:
        self._config, self._steps = config.drafter, config.steps
        self._worker, self._accelerator, self._say = worker, accelerator, say
        ranks = accelerator.num_processes
        self.coordinator = Coordinator(connect_store(ranks), ranks, self._config.least_idle_ranks)
        self._snapshots = DrafterSnapshots(run / "drafters", self._config.snapshots)

    def start(self) -> None:
        """From ``drafter.start``; with its optimizer's state where that is there.

        Raises:
            UserError: where it cannot be used.
        """
        if self._config.start is None or not self._worker.needs_drafter:
            return
        path = Path(self._config.start)
        try:
            self._worker.create_drafter(None, self._load(path))
            if (path / "optimizer.json").is_file():
                self._restore_moments(path / "optimizer")
        except (DrafterError, OptimizerStateError) as error:
            raise UserError(f"drafter.start: {error}") from None

    def resume(self, checkpoint: Checkpoint) -> None:
        """The newest whole snapshot, also one made after the checkpoint (a drafter that is ahead costs acceptance at most); else
        the checkpoint's own."""
        if not self._worker.needs_drafter:
            return
        found = self._newest(checkpoint)
        names = gather_object([None if found is None else str(found[1])])
        if found is None:
            return
        if len(set(names)) > 1:
            self._tell("ranks cannot read the same one; a fresh one is made")
            return
        model, moments = found
        self._worker.create_drafter(None, model)
        if "drafter_optimizer" in checkpoint.broken and moments.parent == checkpoint.path:
            return
        try:
            self._restore_moments(moments)
        except OptimizerStateError as error:
            self._tell(str(error))

    def _newest(self, checkpoint: Checkpoint) -> tuple[Eagle3Model, Path] | None:
        """A drafter and where its optimizer's state lies."""
        runner = self._worker.engine.runner
        found, problems = self._snapshots.newest(runner.vocab_size, runner.hidden_size)
        for problem in problems:
            self._tell(problem)
        if found is not None and found[0] >= checkpoint.steps_done:
            return found[2], found[1] / "optimizer"
        if "drafter" in checkpoint.broken or not (checkpoint.path / "drafter").is_dir():
            return None
        try:
            return self._load(checkpoint.path / "drafter"), checkpoint.path / "drafter_optimizer"
        except DrafterError as error:
            self._tell(f"{error}; a fresh one is made")
            return None

    def _load(self, path: Path) -> Eagle3Model:
        return load_drafter(path, self._worker.engine.runner.vocab_size, self._worker.engine.runner.hidden_size)

    def _restore_moments(self, stem: Path) -> None:
        assert self._worker.spot is not None
        for learner in self._worker.spot.learners:
            learner.restore(stem)

    def train(self, done: RankRollouts, rewards: Sequence[float], step: int) -> LearnerReport:
        """This rank has finished its rollouts: training while others decode, or for whole passes, as the recipe has it.

        Args:
            done: This step's rollouts.
            rewards: Of each.
            step: Of the run, for the learning rate.
        """
        self.coordinator.idle()
        for learner in self._worker.spot.learners if self._worker.spot is not None else ():
            learner.scale_rate(rate_at(step, self._steps, 1, self._config.lr_schedule))
        self._worker.learn_from(done, rewards)
        if self._config.schedule == "never":
            return LearnerReport()
        if self._config.schedule == "always":
            return self._worker.train_drafter(lambda: False)
        self.coordinator.wait_until_training()
        report = self._worker.train_drafter(lambda: not self.coordinator.may_train())
        self._tell(self.coordinator.take_problem())
        return report

    def share(self, done: RankRollouts, report: LearnerReport, step: int) -> None:
        """Every rank drafts with the mean of what ranks have approved, by their updates. The first step's rollouts choose the
        vocabulary. Collective.

        Args:
            done: This step's rollouts.
            report: This step's training; what its snapshot took is noted there.
            step: Index of the step.
        """
        if self._worker.needs_drafter:
            self._worker.create_drafter(self._vocabulary_of(done))
            return
        spot = self._worker.spot
        if spot is None:
            return
        updates = sum(gather_object([report.approved]))
        if updates:
            share = report.approved / updates
            spot.adopt([self._accelerator.reduce(p.detach() * share, "sum") for p in spot.approved.parameters()])
        every = self._config.vocabulary_every
        anew = every > 0 and (step + 1) % every == 0
        if anew:
            self._worker.change_vocabulary(self._vocabulary_of(done))
        if not updates and not anew:
            return
        self._tell(self._worker.take_over_drafter())
        if self._accelerator.is_main_process and self._config.snapshots:
            self._tell(self._snapshots.save(step + 1, spot.serving, spot.learner.optimizer))
            report.snapshot_seconds = self._snapshots.seconds

    def _vocabulary_of(self, done: RankRollouts) -> torch.Tensor:
        """The draft vocabulary that serves all ranks' rollouts of this step best."""
        everywhere = gather_object([[*r.request.prompt_ids, *r.token_ids] for r in done.rollouts])
        return choose_vocabulary(everywhere, self._config.draft_vocab_size, self._worker.engine.runner.vocab_size)

    def finish(self) -> None:
        """Returns once nothing is being written any more."""
        self._tell(self._snapshots.wait())

    def _tell(self, problem: str | None) -> None:
        if problem is not None:
            self._say(f"drafter: {problem}")
