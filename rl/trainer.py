"""The RL loop: generate → score → distil → update → sync."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import gather_object

from paceline.rl.checkpointing.checkpoint import (
    AttributeState,
    Checkpoint,
    Stateful,
    Writer,
    save_checkpoint,
)
from paceline.rl.checkpointing.graceful_stop import GracefulStop
from paceline.rl.checkpointing.kept_checkpoints import keep_checkpoint
from paceline.rl.checkpointing.parts import (
    restore_selector,
    write_critic,
    write_lengths,
    write_policy,
    write_speculation,
)
from paceline.rl.checkpointing.run_directory import on_main
from paceline.rl.config.run import RunConfig, to_dict
from paceline.rl.drafting.rank_drafter import RankDrafter
from paceline.rl.drafting.shared import SharedDrafter
from paceline.rl.errors import UserError
from paceline.rl.evaluation.during_training import EvaluationFailed, RunEvaluation
from paceline.rl.generation.anytime import Anytime, AnytimeCredit
from paceline.rl.generation.groups import CarriedGroups
from paceline.rl.generation.progress import RolloutProgress
from paceline.rl.generation.scored import ScoredGenerator, ScoredRollouts, ScoringFailed
from paceline.rl.generation.vllm import VllmRollouts
from paceline.rl.generation.worker import RolloutWorker
from paceline.rl.learner.policy import PolicyLearner
from paceline.rl.memory.gpu import check_memory, trainer_memory
from paceline.rl.models.initial import copy_weights, decoding_copy, starting_policy, trained_policy
from paceline.rl.models.loading import load_tokenizer
from paceline.rl.models.policy_files import read_config
from paceline.rl.monitoring.collapse_guard import CollapseGuard
from paceline.rl.monitoring.metrics import RankStep, rank_record, step_metrics
from paceline.rl.monitoring.timeline import Clock
from paceline.rl.monitoring.tracker import Tracker
from paceline.rl.process.process_tuning import release_freed_memory
from paceline.rl.rewards.pool import ScoringPool
from paceline.rl.rewards.shaping import Shaped, Shaping
from paceline.rl.sharding import is_shared
from paceline.rl.tasks.prompt_check import check_prompts
from paceline.rl.tasks.sampler import create_prompt_sampler
from paceline.rl.tasks.task import load_task
from paceline.rl.types import RankRollouts
from paceline.rollout.model.memory_plan import process_room


class Trainer:
    """One rank of a run.

    Args:
        config: The recipe.
        run: The run's directory, which exists.
        accelerator: The process group and precision of the run.
        checkpoint: The checkpoint to resume from, or None.
        tracker: Receives metrics and lines for the user.

    Raises:
        UserError: when the recipe does not fit the policy, the data or the number of ranks.
    """

    def __init__(
        self,
        config: RunConfig,
        run: Path,
        accelerator: Accelerator,
        checkpoint: Checkpoint | None,
        tracker: Tracker,
    ) -> None:
        self.config, self.run_dir, self.accelerator, self.tracker = config, run, accelerator, tracker
        prompts, ranks = config.rollout.prompts_per_step, accelerator.num_processes
        if prompts % ranks:
            raise UserError(
                f"rollout.prompts_per_step is {prompts}, not a multiple of the {ranks} ranks: write "
                f"{-(-prompts // ranks) * ranks}, or change the number of ranks"
            )
        self._group_size, self._plain_every = config.rollout.group_size, config.measure.plain_every
        self._load_task()
        self._check_memory()
        self._load_policy(None if checkpoint is None else checkpoint.path)
        self._build_generation()
        self.guard = CollapseGuard(config.length.guard)
        self.scoring.wait_ready()  # a wrong reward is reported before the first step
        if self.scoring.notice is not None:
            tracker.say(self.scoring.notice)
        self.evaluation = self._evaluation() if config.eval_every else None
        self.stateful = self._stateful()
        self.first_step = 0
        if checkpoint is not None:
            self._resume(checkpoint)
        else:
            self.drafter.start()
        self._saved = self.first_step

    def _load_task(self) -> None:
        config = self.config
        self.source = starting_policy(config)
        self.tokenizer = load_tokenizer(self.source)
        self.task = load_task(config.task, config.seed)
        for line in check_prompts(self.task, config, self.tokenizer):
            self.tracker.say(line)
        self.choice = create_prompt_sampler(self.task, config.seed, config.task.curriculum)
        self.scoring = ScoringPool(config.task, config.seed, config.rollout.group_size)

    def _check_memory(self) -> None:
        """Refuses, before weights are loaded, what does not fit a rank's GPU."""
        self._on_gpu = self.accelerator.device.type == "cuda"
        if self._on_gpu and self.config.rollout.vllm is None:
            room, ranks = process_room(self.accelerator.device), self.accelerator.num_processes
            plan = check_memory(self.config, read_config(self.source), ranks, room)
            self.tracker.say(f"memory of a rank: {plan}")

    def _load_policy(self, checkpoint: Path | None) -> None:
        config, accelerator = self.config, self.accelerator
        self.policy = trained_policy(config, self.source, accelerator.device, checkpoint)
        self.decoded = (
            self.policy
            if is_shared(config.scale)
            else decoding_copy(config, self.source, accelerator.device, checkpoint)
        )
        # before the engine, which records where parameters are: wrapping them for training may move them
        self.learner = PolicyLearner(config, self.policy, self.source, accelerator, checkpoint)
        self.shaping = Shaping(config, self.tokenizer)

    def _build_generation(self) -> None:
        config, accelerator, log = self.config, self.accelerator, self.tracker.say
        self.vllm = None if config.rollout.vllm is None else VllmRollouts(config, self.source, accelerator)
        ranks = accelerator.num_processes
        others = trainer_memory(config, self.decoded.config, ranks) if self._on_gpu else None
        self.worker = RolloutWorker(config, self.decoded, self.tokenizer, self.vllm, others)
        if self.vllm is None:
            log(f"{type(self.decoded).__name__}: {self.worker.fusion}")
        self.anytime = (
            None if config.length.anytime is None else Anytime(config, self.tokenizer, self.worker.engine)
        )
        local = RankDrafter(config, self.decoded, self.worker, accelerator.process_index, self.vllm)
        self.drafter = SharedDrafter(config, local, accelerator, self.run_dir, log)
        self.generator = ScoredGenerator(
            config,
            self.worker,
            self.scoring,
            self.choice,
            self.tokenizer,
            accelerator,
            log,
            lambda record: self.drafter.beat(record),  # looked up at each call: benchmarks replace it
        )

    def _evaluation(self) -> RunEvaluation:
        decoder = None if self.vllm is None else self.vllm.backend
        read, task = self.generator.text, self.task
        evaluation = RunEvaluation(
            self.config, self.worker, decoder, self.tokenizer, read, self.accelerator, task
        )
        self.tracker.say(evaluation.origin)
        return evaluation

    def _stateful(self) -> dict[str, Stateful]:
        """Returns what a checkpoint keeps as JSON, by the names under which it is kept."""
        parts: dict[str, Stateful] = {
            "kl_coef": AttributeState(self.learner.kl, "value"),
            "entropy": AttributeState(self.learner, "entropy"),
            "prompts": self.choice,
            "guard": self.guard,
            "open": CarriedGroups(self.worker.groups, self.task.find, self.accelerator),
        }
        return parts if self.evaluation is None else {**parts, "evaluation": self.evaluation}

    def _resume(self, checkpoint: Checkpoint) -> None:
        self.first_step = checkpoint.steps_done
        if self.vllm is not None:
            self.vllm.update_policy(self.learner.weights())
        self.drafter.resume(checkpoint)
        problem = restore_selector(checkpoint, self.worker.selector)
        if problem is not None:
            self.tracker.say(problem)
        weights = checkpoint.path / "lengths.safetensors"
        if not self.worker.restore_lengths(weights, self.first_step):
            self.tracker.say(f"{weights}: cannot be read; lengths are learned anew")
        try:
            for name, part in self.stateful.items():
                if name in checkpoint.state:
                    part.load_state(checkpoint.state[name])
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{checkpoint.path / 'state.json'}: not a checkpoint's state ({reason}); put back a copy of "
                "it, or start anew"
            ) from None

    def run(self, interruption: GracefulStop | None = None) -> bool:
        """Runs the remaining steps, or those until it is asked to stop, and saves the last one.

        Args:
            interruption: Asked after each step on every rank.

        Returns:
            Whether no step remains.
        """
        with self.scoring, self.tracker.steps(self.first_step) as progress:
            step = self.first_step - 1
            for step in range(self.first_step, self.config.steps):
                metrics, timeline = self._step_or_save(step)
                last = step + 1 == self.config.steps
                best = self._evaluate(step, metrics, timeline, last)
                collapse = self.guard.observe(metrics)
                self.tracker.log(step, metrics, timeline)
                self.tracker.say(_line(step, self.config.steps, metrics) + self.tracker.time_left(step))
                progress.update(step + 1 - self.first_step)
                if collapse is not None and self.config.length.guard.action == "stop":
                    raise UserError(
                        f"step {step + 1}: {collapse}; the run stops, its last checkpoint stays in "
                        f"{self.run_dir}"
                    )
                if collapse is not None:
                    self.tracker.say(collapse)
                stop = self._stops(interruption)
                keep = best and self.config.keep_best
                if last or stop or keep or (step + 1) % self.config.save_every == 0:
                    self._save(step + 1, keep)
                    self._saved = step + 1
                if stop:
                    break
        self.drafter.finish()
        if self.vllm is not None:
            self.vllm.close()
        return step + 1 == self.config.steps

    def _evaluate(
        self, step: int, metrics: dict[str, Any], timeline: list[dict[str, Any]], last: bool
    ) -> bool:
        """Evaluates after the steps that the recipe names, and adds to the metrics. Collective.

        When no completion can be scored, the step is saved before the run ends.

        Returns:
            Whether this was the best evaluation so far.
        """
        if self.evaluation is None or not (last or (step + 1) % self.config.eval_every == 0):
            return False
        try:
            with self.tracker.phase(step, "evaluate"):
                evaluated, best = self.evaluation.run(step + 1)
        except EvaluationFailed as error:
            self.tracker.log(step, metrics, timeline)
            self._save(step + 1)
            raise UserError(
                f"{error}; the run stops, what it has learned is in {self.run_dir / 'checkpoint'}"
            ) from None
        metrics.update(evaluated)
        return best

    def _step_or_save(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Runs a step. When none of its completions can be scored, saves the steps before it and raises."""
        try:
            return self.step(step)
        except ScoringFailed as error:
            if step > self._saved:
                self._save(step)
            kept = (
                f"what it had learned by then is in {self.run_dir / 'checkpoint'}"
                if step
                else "nothing was trained"
            )
            raise UserError(f"{error}; the run stops, {kept}") from None

    def _stops(self, interruption: GracefulStop | None) -> bool:
        """Whether any rank was asked to stop; a cluster may signal one machine only. Collective."""
        return any(gather_object([interruption is not None and interruption.asked]))

    def step(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """Runs one RL step. Collective. Returns its metrics and every rank's record."""
        clock = Clock(self.accelerator, partial(self.tracker.phase, step))
        self.drafter.begin_step(step)
        scored = self.generator.generate(step, clock.phase)
        credit = None
        if self.anytime is not None:
            credit = self.generator.demand_answers(self.anytime, scored, step, clock.phase)
        batch = scored.batch
        with clock.phase("reference"):
            samples = self.learner.samples(batch)
        with clock.phase("drafter"):
            distilled = self.drafter.train(batch, scored.rewards, step)
        with clock.phase("wait"):
            self.drafter.wait(distilled)
        self.generator.report_failures(step)
        self._measure_plain(batch, step, clock)
        with clock.phase("update") as shown:
            shaped = self._shape(scored, credit)
            update, critic, advantages = self.learner.learn(batch, samples, shaped, step, shown)
        self._send_weights(clock)
        with clock.phase("sync"):
            release_freed_memory()
            self.worker.refresh_weights()
            self.drafter.share(batch, distilled, step)
            length_errors = self._learn_lengths(batch)
        scores = scored.scores
        mine = RankStep(
            batch=batch,
            scores=scores,
            rewards=scored.rewards,
            shaped=shaped.rewards,
            advantages=advantages,
            distilled=distilled,
            update=update,
            critic=critic,
            spans=clock.spans,
            scoring=[(clock.since(begin), clock.since(end)) for begin, end in scores.busy],
            carried=self.worker.unfinished,
            length_errors=length_errors,
            credit=credit,
        )
        return self._record(mine, step)

    def _shape(self, scored: ScoredRollouts, credit: AnytimeCredit | None) -> Shaped:
        """Returns the rewards that are trained on."""
        batch = scored.batch
        shaped = self.shaping.shape(batch.rollouts, batch.budgets, scored.rewards)
        if credit is None:
            return shaped
        return replace(shaped, tokens=credit.advantages, more=tuple(credit.answers))

    def _measure_plain(self, batch: RankRollouts, step: int, clock: Clock) -> None:
        """Decodes the requests again without speculation, every few steps as configured. Collective."""
        every = self._plain_every
        if not every or (step + 1) % every:
            return
        with clock.phase("measure") as shown:
            self.worker.measure_plain(batch, RolloutProgress(shown, len(batch.rollouts)))
            self.accelerator.wait_for_everyone()

    def _send_weights(self, clock: Clock) -> None:
        """Copies new weights to whatever decodes with weights of its own. Collective."""
        if self.decoded is not self.policy:
            with clock.phase("gather"):
                copy_weights(self.learner.weights(), self.decoded)
        if self.vllm is not None:
            with clock.phase("gather"):
                self.vllm.update_policy(self.learner.weights())

    def _learn_lengths(self, batch: RankRollouts) -> list[float]:
        """Trains every rank's length predictor on all ranks' groups. Collective.

        Returns:
            Losses of what had been predicted for this rank's groups.
        """
        predictor = self.worker.lengths
        if predictor is None:
            return []
        taught, errors = self.worker.lessons(batch)
        predictor.learn(gather_object(taught))
        return errors

    def _record(self, mine: RankStep, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        ranks = gather_object([rank_record(mine)])
        self._write_samples(step, mine.batch, mine.rewards)
        metrics = step_metrics(ranks, self._group_size)
        self.choice.observe(metrics["reward/mean"])
        return metrics, ranks

    def _write_samples(self, step: int, batch: RankRollouts, rewards: Sequence[float]) -> None:
        """Appends the first completion of each prompt of rank 0 to ``rollouts.jsonl``."""
        if not self.accelerator.is_main_process:
            return
        with (self.run_dir / "rollouts.jsonl").open("a", encoding="utf-8") as file:
            for i in range(0, len(batch.rollouts), self._group_size):
                text = self.tokenizer.decode(batch.rollouts[i].token_ids, skip_special_tokens=True)
                sample = {
                    "step": step,
                    "question": batch.problems[i].question,
                    "completion": text,
                    "reward": rewards[i],
                }
                file.write(json.dumps(sample) + "\n")

    def _save(self, steps_done: int, best: bool = False) -> None:
        """Writes a checkpoint. Collective; where it cannot be written, every rank ends."""
        writers = self._writers()
        state = {name: part.state() for name, part in self.stateful.items()}

        def write() -> None:
            save_checkpoint(self.run_dir, steps_done, writers, state, to_dict(self.config))
            keep_checkpoint(self.run_dir, steps_done, self.config.keep_last, best)

        on_main(self.accelerator, write)

    def _writers(self) -> list[Writer]:
        """Collects what a checkpoint keeps in files. Collective. Returns what writes it on the main rank."""
        policy, adapters = self.learner.state()
        critic, lengths = self.learner.critic_state(), self.worker.length_weights()
        drafter, optimizer = self.drafter.served()
        selector = self.worker.selector_state()
        writers: list[Writer] = [
            partial(
                write_policy, policy=self.policy, tokenizer_from=self.source, state=policy, adapters=adapters
            ),
            partial(
                write_speculation,
                drafter=drafter,
                optimizer=optimizer,
                selector=selector,
                ensemble=self.drafter.ensemble(),
            ),
        ]
        if critic is not None:
            writers.append(partial(write_critic, state=critic))
        if lengths is not None:
            writers.append(partial(write_lengths, weights=lengths))
        return writers


def _line(step: int, steps: int, m: dict[str, Any]) -> str:
    speedup = f"  {m['measure/rollout_speedup']:.2f}x plain" if "measure/rollout_speedup" in m else ""
    evaluated = f"  evaluation {m['eval/reward']:.3f}" if "eval/reward" in m else ""
    return (
        f"step {step + 1:>3}/{steps}  reward {m['reward/mean']:.3f}  length {m['length/mean']:.0f} (max "
        f"{m['length/max']})  "
        f"accepted length {m['rollout/acceptance_length']:.2f}  rollout {m['rollout/seconds']:.1f} s  "
        f"update {m['time/update']:.1f} s{speedup}{evaluated}"
    )


def make_accelerator(config: RunConfig, timeout: timedelta) -> Accelerator:
    """Returns the process group and precision of a run, from torchrun's environment.

    Args:
        config: The recipe.
        timeout: The longest that a rank waits for another before it gives up with an error.
    """
    handlers = [
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
        InitProcessGroupKwargs(timeout=timeout),
    ]
    return Accelerator(
        cpu=not torch.cuda.is_available(),
        mixed_precision=config.policy.mixed_precision,
        kwargs_handlers=handlers,
    )
