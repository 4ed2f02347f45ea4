"""Keeps one drafter for all ranks: trained where they idle, averaged between steps, restored on resume."""

from __future__ import annotations

import platform
import time
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
from paceline.drafter_trainer.storage.ensemble import EnsembleState, read_ensemble
from paceline.drafter_trainer.storage.snapshots import DrafterSnapshots
from paceline.rl.algorithms.lr_schedule import rate_at
from paceline.rl.checkpointing.checkpoint import Checkpoint
from paceline.rl.config.run import RunConfig
from paceline.rl.drafting.rank_drafter import RankDrafter
from paceline.rl.errors import UserError
from paceline.rl.models.initial import starting_drafter
from paceline.rl.types import RankRollouts
from paceline.rollout import StepRecord
from paceline.rollout.drafters.eagle3_model import Eagle3Model


class SharedDrafter:
    """Keeps this rank's drafter equal to that of all other ranks. One instance per rank.

    A drafter that cannot be read costs acceptance, never the run: on resume it is skipped with one line, and
    the run continues from ``drafter.start``, or with a new drafter that is created after the next step's
    rollouts.

    Args:
        config: The recipe.
        local: This rank's drafter.
        accelerator: The run's accelerator.
        run: The run's directory.
        log: Receives one line for each problem.

    Attributes:
        local: This rank's drafter.
        coordinator: Knows which ranks are idle.
    """

    def __init__(
        self,
        config: RunConfig,
        local: RankDrafter,
        accelerator: Accelerator,
        run: Path,
        log: Callable[[str], None],
    ) -> None:
        self._run_config, self._config, self._steps = config, config.drafter, config.steps
        self.local, self._accelerator, self._log = local, accelerator, log
        ranks = accelerator.num_processes
        self.coordinator = Coordinator(
            connect_store(ranks),
            ranks,
            self._config.least_idle_ranks,
            max_slowdown=self._config.max_slowdown,
            machine=platform.node(),
        )
        self._snapshots = DrafterSnapshots(run / "drafters", self._config.snapshots)

    def served(self) -> tuple[Eagle3Model, torch.optim.Optimizer] | tuple[None, None]:
        """Returns the served weights and their optimizer, see `RankDrafter.served`."""
        return self.local.served()

    def ensemble(self) -> EnsembleState | None:
        """Returns the drafters that are trained side by side; None for a single one."""
        return self.local.ensemble()

    def begin_step(self, step: int) -> None:
        """Tells the other ranks that this rank is decoding."""
        self.coordinator.begin(step, self.local.worker.selector.most_saved("eagle3"))

    def beat(self, record: StepRecord) -> None:
        """Tells the other ranks that this rank is alive, and measures what their training costs it.

        Args:
            record: The decode step that has just ended.
        """
        self.coordinator.beat()
        self.coordinator.decoded(record.feedback)

    def start(self) -> None:
        """Starts from ``drafter.start``, and its optimizer's state if there is one.

        Raises:
            UserError: when that drafter cannot be used.
        """
        if not self.local.missing:
            return
        model = starting_drafter(self._run_config, self.local.policy_config)
        if model is None:
            return
        self.local.create(None, model)
        moments = Path(str(self._config.start)) / "optimizer"
        if (model.mask_token is not None) != (self._config.parallel_positions > 0):
            return  # the optimizer's state is of a drafter with other weights
        if moments.with_suffix(".json").is_file():
            try:
                self._restore_moments(moments)
            except OptimizerStateError as error:
                raise UserError(f"drafter.start: {error}; delete {moments}.* to begin without it") from None

    def resume(self, checkpoint: Checkpoint) -> None:
        """Restores the newest readable drafter. Collective.

        The candidates are the snapshots, the checkpoint's drafter and ``drafter.start``, in this order.

        A snapshot may be newer than the checkpoint: a drafter that is ahead of the policy costs acceptance at
        most. When none can be read, one line says so and a new drafter is created after the next rollouts.
        """
        if not self.local.missing:
            return
        found = self._newest(checkpoint)
        names = gather_object([None if found is None else str(found[1])])
        if len(set(names)) > 1:
            self._report("ranks cannot read the same one; a fresh one is made")
            return
        if found is None:
            return
        model, moments = found
        self.local.create(None, model)
        if moments is None:
            return
        broken = checkpoint.broken if moments.parent == checkpoint.path else frozenset()
        ensemble = moments.with_name(moments.name.replace("optimizer", "ensemble"))
        if ensemble.name not in broken and self._restore_ensemble(ensemble):
            return
        if moments.name in broken:
            return
        try:
            self._restore_moments(moments)
        except OptimizerStateError as error:
            self._report(f"{error}; its optimizer begins anew")

    def _newest(self, checkpoint: Checkpoint) -> tuple[Eagle3Model, Path | None] | None:
        """Returns the newest readable drafter and the path of its optimizer's state, or None."""
        runner, wanted = self.local.runner, self._required()
        found, problems = self._snapshots.newest(runner.vocab_size, runner.hidden_size, **wanted)
        for problem in problems:
            self._report(problem)
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
                self._report(str(error))
        return self._begun_again()

    def _begun_again(self) -> tuple[Eagle3Model, None] | None:
        """Returns the drafter of ``drafter.start`` and logs that it is used; None when there is none."""
        model: Eagle3Model | None = None
        try:
            model = starting_drafter(self._run_config, self.local.policy_config)
        except UserError as error:
            self._report(str(error))
        if model is None:
            self._report("a fresh one is made")
            return None
        self._report(f"it begins again from {self._config.start}")
        return model, None

    def _restore_moments(self, stem: Path) -> None:
        for learner in self.local.learners:
            learner.restore(stem)

    def _restore_ensemble(self, folder: Path) -> bool:
        """Restores the drafters that are trained side by side; returns False if there are none to restore."""
        spot, runner = self.local.spot, self.local.runner
        if spot is None or len(spot.learners) == 1 or not folder.is_dir():
            return False
        try:
            spot.restore(read_ensemble(folder, runner.vocab_size, runner.hidden_size, **self._required()))
        except (DrafterError, OptimizerStateError) as error:
            self._report(f"{error}; its ensemble begins anew from the served drafter")
            return False
        except ValueError as error:
            self._report(f"{folder}: {error}; its ensemble begins anew from the served drafter")
            return False
        return True

    def _required(self) -> dict[str, Any]:
        """Returns what a stored drafter must have been made for, see `load_drafter`."""
        return {
            "tap_layers": self.local.tap_layers,
            "draft_vocab_size": self._config.draft_vocab_size,
        }

    def train(self, batch: RankRollouts, rewards: Sequence[float], step: int) -> LearnerReport:
        """Trains the drafter once this rank has finished its rollouts.

        With ``drafter.schedule: idle`` it trains while other ranks decode, with ``always`` for whole passes,
        and with ``never`` not at all.

        Args:
            batch: This step's rollouts.
            rewards: The reward of each rollout.
            step: Index of the step, which decides the learning rate.
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
        with self.coordinator.training():
            report = self.local.train(self.coordinator.must_stop)
        self._report(self.coordinator.take_problem())
        return report

    def wait(self, report: LearnerReport) -> None:
        """Waits until all ranks have finished their rollouts. Collective.

        Args:
            report: This rank's training in this step; what it cost others, and for how long it was held back
                for that reason, are added to it.
        """
        begin = time.perf_counter()
        self._accelerator.wait_for_everyone()
        waited = time.perf_counter() - begin if self.coordinator.held_back else 0.0
        report.held_back_seconds = self.coordinator.paused_seconds + waited
        self.coordinator.update_price()
        price = self.coordinator.price
        if price.slowdown is not None:
            report.slowdown, report.slowdown_error = price.slowdown, price.std_error

    def share(self, batch: RankRollouts, report: LearnerReport, step: int) -> None:
        """Averages the weights that ranks have approved and lets every rank draft with them. Collective.

        The mean is weighted by the number of updates in each rank's weights. The first step's rollouts choose
        the draft vocabulary.

        Args:
            batch: This step's rollouts.
            report: This rank's training in this step; the time that a snapshot takes is added to it.
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
                self._report(
                    "what was trained has NaN or infinite values; the last good drafter stays in use"
                )
                spot.forget_approved()
        every = self._config.vocabulary_every
        anew = every > 0 and (step + 1) % every == 0
        if anew:
            self.local.change_vocabulary(self._vocabulary_of(batch))
        if not updates and not anew:
            return
        self._report(self.local.swap_in())
        if self._accelerator.is_main_process and self._config.snapshots:
            saved = self._snapshots.save(step + 1, spot.serving, spot.learner.optimizer, spot.ensemble())
            self._report(saved)
            report.snapshot_seconds = self._snapshots.seconds

    def _vocabulary_of(self, batch: RankRollouts) -> torch.Tensor:
        """Returns the draft vocabulary that covers all ranks' rollouts of this step best. Collective."""
        everywhere = gather_object(batch.texts)
        return self.local.choose_vocabulary(everywhere)

    def finish(self) -> None:
        """Waits until the last snapshot is written."""
        self._report(self._snapshots.wait())

    def _report(self, problem: str | None) -> None:
        if problem is not None:
            self._log(f"drafter: {problem}")
