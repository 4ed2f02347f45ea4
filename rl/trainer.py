"""The RL loop: rollout → distil → score → advantages → update."""

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

from paceline.rl.algorithms.advantages import uniform_groups
from paceline.rl.checkpointing.checkpoint import Checkpoint, restore_selector, save_checkpoint
from paceline.rl.checkpointing.graceful_stop import Interruption
from paceline.rl.checkpointing.kept_checkpoints import keep_checkpoint
from paceline.rl.checkpointing.run_directory import on_main
from paceline.rl.config.run import RunConfig, to_dict
from paceline.rl.drafting.rank_drafter import RankDrafter
from paceline.rl.drafting.shared import SharedDrafter
from paceline.rl.errors import UserError
from paceline.rl.evaluation.during_training import EvaluationFailed, RunEvaluation
from paceline.rl.generation.anytime import Anytime, Dense
from paceline.rl.generation.progress import RolloutProgress
from paceline.rl.generation.vllm import VllmRollouts
from paceline.rl.generation.worker import RolloutWorker
from paceline.rl.learner.policy import PolicyLearner
from paceline.rl.models.initial import copy_weights, decoding_copy, starting_policy, trained_policy
from paceline.rl.models.policies import load_tokenizer
from paceline.rl.monitoring.collapse_guard import Guard
from paceline.rl.monitoring.metrics import RankStep, rank_record, step_metrics
from paceline.rl.monitoring.timeline import Clock
from paceline.rl.monitoring.tracker import Tracker
from paceline.rl.rewards.pool import Scores, ScoringPool
from paceline.rl.rewards.shaping import Shaping
from paceline.rl.sharding import is_shared
from paceline.rl.tasks.prompt_check import check_prompts
from paceline.rl.tasks.prompts import scored_text
from paceline.rl.tasks.sampler import prompt_choice
from paceline.rl.tasks.task import Problem, load_task
from paceline.rl.types import RankRollouts
from paceline.rollout import FinishReason, Rollout, StepRecord

# more steps than any run has: added to the step for each further round, so that its seeds are new
_ROUND = 10**9


class ScoringFailed(Exception):
    """No completion of a step has a reward; the message says why."""


class Trainer:
    """One rank of a run.

    Args:
        config: The recipe.
        run: The run's directory, which exists.
        accelerator: Of this process.
        checkpoint: To go on from, or None.
        tracker: Where metrics and lines go.
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
        if config.rollout.prompts_per_step % accelerator.num_processes:
            raise UserError(
                f"prompts_per_step is {config.rollout.prompts_per_step}, not a multiple of the "
                f"{accelerator.num_processes} ranks"
            )
        self.source = starting_policy(config)
        self.tokenizer = load_tokenizer(self.source)
        self.task = load_task(config.task, config.seed)
        for line in check_prompts(self.task, config, self.tokenizer):
            tracker.say(line)
        self.choice = prompt_choice(self.task, config.seed, config.task.curriculum)
        self.scoring = ScoringPool(config.task, config.seed, config.rollout.group_size)
        whole = None if checkpoint is None else checkpoint.path
        self.policy = trained_policy(config, self.source, accelerator.device, whole)
        shared = is_shared(config.scale)
        self.decoded = (
            self.policy if shared else decoding_copy(config, self.source, accelerator.device, whole)
        )
        # before the engine, which notes where parameters lie: wrapping them for training may move them
        self.learner = PolicyLearner(config, self.policy, self.source, accelerator, whole)
        self.shaping = Shaping(config, self.tokenizer)
        self.vllm = None if config.rollout.vllm is None else VllmRollouts(config, self.source, accelerator)
        self.worker = RolloutWorker(config, self.decoded, self.tokenizer, self.vllm)
        if self.vllm is None:
            tracker.say(f"{type(self.decoded).__name__}: {self.worker.engine.fusion}")
        self.anytime = (
            None if config.length.anytime is None else Anytime(config, self.tokenizer, self.worker.engine)
        )
        self.drafter = SharedDrafter(
            config,
            RankDrafter(config, self.decoded, self.worker, accelerator.process_index, self.vllm),
            accelerator,
            run,
            tracker.say,
        )
        self.guard = Guard(config.length.guard)
        self.scoring.wait_ready()  # a wrong reward is said before the first step
        if self.scoring.notice is not None:
            tracker.say(self.scoring.notice)
        self._said: set[str] = set()
        self.evaluation: RunEvaluation | None = None
        if config.eval_every:
            decoder = None if self.vllm is None else self.vllm.backend
            self.evaluation = RunEvaluation(
                config, self.worker, decoder, self.tokenizer, self._scored_text, accelerator, self.task
            )
            tracker.say(self.evaluation.origin)
        self.first_step = 0
        if checkpoint is not None:
            self._resume(checkpoint)
        else:
            self.drafter.start()
        self._saved = self.first_step

    def _resume(self, checkpoint: Checkpoint) -> None:
        self.first_step = checkpoint.steps_done
        if self.vllm is not None:
            self.vllm.update_policy(self.learner.weights())
        self.drafter.resume(checkpoint)
        problem = restore_selector(checkpoint, self.worker.engine.speculation.selector)
        if problem is not None:
            self.tracker.say(problem)
        rank, ranks = self.accelerator.process_index, self.accelerator.num_processes
        if self.worker.groups.lengths is not None and not self.worker.groups.lengths.restore(
            checkpoint.path / "lengths.safetensors", self.first_step
        ):
            self.tracker.say(
                f"{checkpoint.path / 'lengths.safetensors'}: cannot be read; lengths are learned anew"
            )
        try:
            self.choice.load_state(checkpoint.state.get("prompts", {}))
            self.guard.load_state(checkpoint.state.get("guard", {}))
            if self.evaluation is not None:
                self.evaluation.load_state(checkpoint.state.get("evaluation", {}))
            self.learner.kl.value = float(checkpoint.state.get("kl_coef", self.learner.kl.value))
            self.learner.entropy = checkpoint.state.get("entropy")
            self.worker.groups.load_open(checkpoint.state.get("open", [])[rank::ranks], self.task.find)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise UserError(
                f"{checkpoint.path / 'state.json'}: not a checkpoint's state ({reason}); put back a copy of "
                "it, or start anew"
            ) from None

    def run(self, interruption: Interruption | None = None) -> bool:
        """All remaining steps, or those until it is asked to stop: then the last one is saved.

        Args:
            interruption: Asked after each step, on the main rank.

        Returns:
            Whether no step remains.
        """
        with self.scoring, self.tracker.steps(self.first_step) as whole:
            step = self.first_step - 1
            for step in range(self.first_step, self.config.steps):
                metrics, timeline = self._step_or_save(step)
                last = step + 1 == self.config.steps
                best = self._evaluate(step, metrics, timeline, last)
                collapse = self.guard.observe(metrics)
                self.tracker.log(step, metrics, timeline)
                self.tracker.say(_line(step, self.config.steps, metrics) + self.tracker.time_left(step))
                whole.update(step + 1 - self.first_step)
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
        """Evaluates where the recipe has it, and adds to the metrics. Returns whether this was the best so
        far. Collective.

        When no completion can be scored, the step is saved before the run ends.
        """
        if self.evaluation is None or not (last or (step + 1) % self.config.eval_every == 0):
            return False
        try:
            with self.tracker.phase(step, "evaluate"):
                found, best = self.evaluation.run(step + 1)
        except EvaluationFailed as error:
            self.tracker.log(step, metrics, timeline)
            self._save(step + 1)
            raise UserError(
                f"{error}; the run stops, what it has learned is in {self.run_dir / 'checkpoint'}"
            ) from None
        metrics.update(found)
        return best

    def _step_or_save(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """The step; when none of its completions can be scored, what the steps before it made is saved
        first.
        """
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

    def _stops(self, interruption: Interruption | None) -> bool:
        """Whether any rank was asked to stop: a cluster may tell those of one machine. Collective."""
        return any(gather_object([interruption is not None and interruption.asked]))

    def step(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One RL step. Returns its metrics and every rank's record."""
        clock = Clock(self.accelerator, partial(self.tracker.phase, step))
        self.drafter.coordinator.begin(step)
        done, scores, rewards = self._rollouts(step, clock)
        dense = self._demand_answers(done, rewards, step, clock)
        with clock.phase("reference"):
            samples = self.learner.samples(done)
        with clock.phase("drafter"):
            distilled = self.drafter.train(done, rewards, step)
        with clock.phase("wait"):
            self.accelerator.wait_for_everyone()
        if self.config.measure.plain_every and (step + 1) % self.config.measure.plain_every == 0:
            with clock.phase("measure") as shown:
                self.worker.measure_plain(done, RolloutProgress(shown, len(done.rollouts)))
                self.accelerator.wait_for_everyone()
        with clock.phase("update") as shown:
            shaped = self.shaping.shape(done.rollouts, done.budgets, rewards)
            if dense is not None:
                shaped = replace(shaped, tokens=dense.advantages, more=tuple(dense.answers))
            update, critic, advantages = self.learner.learn(done, samples, shaped, step, shown)
        if self.decoded is not self.policy:
            with clock.phase("gather"):
                copy_weights(self.learner.weights(), self.decoded)
        if self.vllm is not None:
            with clock.phase("gather"):
                self.vllm.update_policy(self.learner.weights())
        with clock.phase("sync"):
            self.worker.engine.refresh_weights()
            self.drafter.share(done, distilled, step)
            errors = self._learn_lengths(done)
        mine = RankStep(
            done=done,
            scores=scores,
            rewards=rewards,
            shaped=shaped.rewards,
            advantages=advantages,
            distilled=distilled,
            update=update,
            critic=critic,
            spans=clock.spans,
            scoring=[(clock.since(begin), clock.since(end)) for begin, end in scores.busy],
            carried=sum(len(group.pending()) for group in self.worker.groups.open),
            length_errors=errors,
            dense=dense,
        )
        ranks = gather_object([rank_record(mine)])
        self._write_samples(step, done, rewards)
        metrics = step_metrics(ranks, self.config.rollout.group_size)
        self.choice.observe(metrics["reward/mean"])
        return metrics, ranks

    def _demand_answers(
        self, done: RankRollouts, rewards: list[float], step: int, clock: Clock
    ) -> Dense | None:
        """Answers to cut thoughts and what they credit, where the recipe has it."""
        if self.anytime is None:
            return None
        with clock.phase("rollout"):
            thoughts, cuts = self.anytime.demand(done, step)
        with clock.phase("score"):
            self.anytime.hand_over(done, cuts, self._scored_text, self.scoring.add)
            found = self.scoring.collect()
        self._say_failures(step, found)
        scores = [found.values.get(number, self.config.task.score_failed) for number in range(len(cuts))]
        return self.anytime.credit(done, thoughts, rewards, cuts, scores)

    def _learn_lengths(self, done: RankRollouts) -> list[float]:
        """Every rank learns from all ranks' groups. Returns the losses of what had been predicted of this
        rank's.
        """
        if self.worker.groups.lengths is None:
            return []
        taught, errors = self.worker.groups.lessons(done)
        self.worker.groups.lengths.learn(gather_object(taught))
        return errors

    def _rollouts(self, step: int, clock: Clock) -> tuple[RankRollouts, Scores, list[float]]:
        """This rank's completions with their rewards; where groups say nothing and the recipe has it, others
        beside them.
        """
        rank, ranks, rollout = (
            self.accelerator.process_index,
            self.accelerator.num_processes,
            self.config.rollout,
        )
        problems = self.choice.choose(step, rollout.prompts_per_step)[rank::ranks]
        done, scores, rewards = self._round(problems, step, 0, clock)
        for number in range(1, rollout.resample + 1):
            silent = len(uniform_groups(rewards, rollout.group_size)) - (
                len(done.problems) // rollout.group_size - len(problems)
            )
            if silent <= 0:
                break
            more = self.choice.more(step, silent, number, rank)
            # ranks may draw the same problem
            again, scored, rewarded = self._round(more, step, number * ranks + rank, clock)
            done, rewards = done.joined(again), [*rewards, *rewarded]
            scores.note(scored)
        self._say_failures(step, scores)
        return done, scores, rewards

    def _say_failures(self, step: int, scores: Scores) -> None:
        """Says how many completions have no score. Collective.

        Raises:
            ScoringFailed: on every rank, when no completion of any has one.
        """
        asked, failed, problems, notices = zip(
            *gather_object([(scores.asked, scores.failed, scores.problem, scores.notice)]), strict=True
        )
        problem = next((p for p in problems if p is not None), None)
        notice = next((n for n in notices if n is not None), None)
        if notice is not None and notice not in self._said:
            self._said.add(notice)
            self.tracker.say(notice)
        if not sum(failed):
            return
        if sum(failed) == sum(asked):
            raise ScoringFailed(
                f"step {step + 1}: none of the {sum(asked)} completions has a reward: {problem}"
            )
        self.tracker.say(
            f"reward: {sum(failed)} of {sum(asked)} completions have no score ({problem}); "
            f"they get {self.config.task.score_failed:g}"
        )

    def _round(
        self, problems: list[Problem], step: int, number: int, clock: Clock
    ) -> tuple[RankRollouts, Scores, list[float]]:
        with clock.phase("rollout") as shown:
            progress = RolloutProgress(shown, len(problems) * self.config.rollout.group_size)

            def on_step(record: StepRecord) -> None:
                self.drafter.coordinator.beat()
                progress.on_step(record)

            def on_finish(index: int, problem: Problem, rollout: Rollout) -> None:
                progress.on_finish()
                self._finished(index, problem, rollout)

            # a problem may come again in a later round: with seeds of its own
            done = self.worker.rollout(problems, step + number * _ROUND, on_step, on_finish)
        with clock.phase("score"):
            scores = self.scoring.collect()
        return (
            done,
            scores,
            [scores.values.get(place, self.config.task.score_failed) for place in done.places],
        )

    def _finished(self, index: int, problem: Problem, rollout: Rollout) -> None:
        """A rollout is over: it is scored while others are decoded."""
        if rollout.finish_reason is not FinishReason.FAILED:
            self.scoring.add(index, problem, self._scored_text(rollout.token_ids), rollout.token_ids)

    def _scored_text(self, token_ids: Sequence[int]) -> str:
        return scored_text(self.tokenizer, token_ids, self.config.task, self.worker.params.stop_token_ids)

    def _write_samples(self, step: int, done: RankRollouts, rewards: list[float]) -> None:
        """The first completion of each prompt of rank 0, to read what the policy does."""
        if not self.accelerator.is_main_process:
            return
        with (self.run_dir / "rollouts.jsonl").open("a", encoding="utf-8") as file:
            for i in range(0, len(done.rollouts), self.config.rollout.group_size):
                text = self.tokenizer.decode(done.rollouts[i].token_ids, skip_special_tokens=True)
                sample = {
                    "step": step,
                    "question": done.problems[i].question,
                    "completion": text,
                    "reward": rewards[i],
                }
                file.write(json.dumps(sample) + "\n")

    def _save(self, steps_done: int, best: bool = False) -> None:
        """Writes a checkpoint. Collective; where it cannot be written, every rank ends."""
        policy, adapters = self.learner.state()
        critic = None if self.learner.critic is None else self.learner.critic.state()
        carried = gather_object(self.worker.groups.open_state())
        spot = self.drafter.local.spot

        def write() -> None:
            save_checkpoint(
                self.run_dir,
                steps_done=steps_done,
                policy=self.policy,
                tokenizer_from=self.source,
                state_of_policy=policy,
                adapters=adapters,
                state_of_critic=critic,
                lengths=None
                if self.worker.groups.lengths is None
                else self.worker.groups.lengths.head.state(),
                drafter=spot.serving if spot else None,
                drafter_optimizer=spot.learner.optimizer if spot else None,
                selector=self.worker.engine.speculation.selector.state(),
                state={
                    "kl_coef": self.learner.kl.value,
                    "entropy": self.learner.entropy,
                    "prompts": self.choice.state(),
                    "guard": self.guard.state(),
                    "evaluation": {} if self.evaluation is None else self.evaluation.state(),
                    "open": carried,
                },
                recipe=to_dict(self.config),
            )
            keep_checkpoint(self.run_dir, steps_done, self.config.keep_last, best)

        on_main(self.accelerator, write)


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
    """The process group and precision of a run, from torchrun's environment. A rank that waits longer than
    ``timeout`` for another gives up with an error.
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
