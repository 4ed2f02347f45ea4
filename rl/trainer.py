"""The RL loop: rollout → distil → score → advantages → update."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import broadcast_object_list, gather_object
from transformers import AutoTokenizer

from drafter_trainer.checkpoint import DrafterError, load_drafter
from drafter_trainer.coordinator import Coordinator, connect_store
from drafter_trainer.snapshots import DrafterSnapshots
from drafter_trainer.spot import LearnerReport
from drafter_trainer.vocabulary import choose_vocabulary
from rl.algorithms.grpo import group_advantages
from rl.config import RunConfig, to_dict
from rl.errors import UserError
from rl.log_probs import PolicyLogProbs
from rl.machine import release_freed_memory
from rl.metrics import Span, rank_record, step_metrics
from rl.policies import fetch_policy, load_policy
from rl.rewards.verifiable import load_reward, verifiable_reward
from rl.rollouts import RankRollouts, RolloutWorker
from rl.run_state import (
    Checkpoint,
    keep_first_lines,
    load_checkpoint_drafter,
    load_selector_state,
    restore_optimizer,
    save_checkpoint,
)
from rl.tasks import load_task
from rl.tracking import Tracker
from rl.update import PolicyUpdater, Scored
from rl.warmup import warmed_policy_path
from rollout import FinishReason, StepRecord


class Trainer:
    """One rank of a run.

    Args:
        config: The recipe.
        run: The run's directory, which exists.
        accelerator: Of this process.
        checkpoint: To go on from, or None.
    """

    def __init__(self, config: RunConfig, run: Path, accelerator: Accelerator, checkpoint: Checkpoint | None) -> None:
        self.config, self.run_dir, self.accelerator = config, run, accelerator
        if config.rollout.prompts_per_step % accelerator.num_processes:
            raise UserError(
                f"prompts_per_step is {config.rollout.prompts_per_step}, not a multiple of the {accelerator.num_processes} ranks"
            )
        self.task = load_task(config.task, config.seed)
        self.reward = verifiable_reward if config.task.reward is None else load_reward(config.task.reward)
        self.source = starting_policy(config)
        self.tokenizer = AutoTokenizer.from_pretrained(self.source)
        weights = self.source if checkpoint is None else checkpoint.path / "policy"
        self.policy = load_policy(weights, accelerator.device)
        self.worker = RolloutWorker(config, self.policy, self.tokenizer, accelerator.process_index)
        ranks = accelerator.num_processes
        self.coordinator = Coordinator(connect_store(ranks), ranks, config.drafter.least_idle_ranks)
        self.updater, self.optimizer = self._build_updater()
        self.first_step = 0
        self.snapshots = DrafterSnapshots(run / "drafters", config.drafter.snapshots)
        self._problems: list[str] = []
        if checkpoint is not None:
            self._resume(checkpoint)
        elif config.drafter.start is not None and self.worker.needs_drafter:
            self._start_drafter(Path(config.drafter.start))

    def _build_updater(self) -> tuple[PolicyUpdater, torch.optim.Optimizer]:
        update = self.config.update
        reference = None
        if update.kl_coef > 0:
            start = load_policy(self.source, self.accelerator.device)
            reference = PolicyLogProbs(start).requires_grad_(False).eval()
        if self.config.policy.gradient_checkpointing:
            self.policy.activation_checkpointing_enable()
        module = PolicyLogProbs(self.policy)
        optimizer = torch.optim.AdamW(module.parameters(), lr=update.lr, weight_decay=update.weight_decay, fused=True)
        model, wrapped = self.accelerator.prepare(module, optimizer)
        return PolicyUpdater(self.accelerator, model, wrapped, update, self.config.rollout.temperature, reference), wrapped

    def _start_drafter(self, path: Path) -> None:
        """From a directory; with its optimizer's state where that is there."""
        text = self.policy.config.get_text_config()
        try:
            self.worker.create_drafter(None, load_drafter(path, text.vocab_size, text.hidden_size))
        except DrafterError as error:
            raise UserError(f"drafter.start: {error}") from None
        assert self.worker.spot is not None
        optimizer = self.worker.spot.learner.optimizer
        if (path / "optimizer.json").is_file():
            restore_optimizer(optimizer, path / "optimizer")
            for group in optimizer.param_groups:
                group["lr"] = self.config.drafter.lr

    def _resume(self, checkpoint: Checkpoint) -> None:
        restore_optimizer(self.optimizer, checkpoint.path / "optimizer")
        if self.worker.needs_drafter:
            self._resume_drafter(checkpoint)
        state = load_selector_state(checkpoint)
        if state is not None:
            try:
                self.worker.engine.speculation.selector.load_state(state)
            except ValueError as error:
                raise UserError(f"{checkpoint.path / 'selector.json'}: {error}") from None
        self.first_step = checkpoint.steps_done
        if self.accelerator.is_main_process:
            for name in ("metrics.jsonl", "timeline.jsonl", "rollouts.jsonl"):
                keep_first_lines(self.run_dir / name, checkpoint.steps_done)

    def _resume_drafter(self, checkpoint: Checkpoint) -> None:
        """The newest whole snapshot, also one made after the checkpoint: a drafter that is ahead costs acceptance at most."""
        text = self.policy.config.get_text_config()
        found, self._problems = self.snapshots.newest(text.vocab_size, text.hidden_size)
        if found is not None and found[0] >= checkpoint.steps_done:
            self.worker.create_drafter(None, found[2])
            assert self.worker.spot is not None
            problem = self.snapshots.restore_optimizer(self.worker.spot.learner.optimizer, found[1])
            self._problems += [] if problem is None else [problem]
            return
        drafter = load_checkpoint_drafter(checkpoint, text.vocab_size, text.hidden_size)
        if drafter is not None:
            self.worker.create_drafter(None, drafter)
            assert self.worker.spot is not None
            restore_optimizer(self.worker.spot.learner.optimizer, checkpoint.path / "drafter_optimizer")

    def run(self, tracker: Tracker) -> None:
        """All remaining steps."""
        for told in self._problems:
            tracker.say(f"drafter: {told}")
        for step in range(self.first_step, self.config.steps):
            metrics, timeline = self.step(step, tracker)
            tracker.log(step, metrics, timeline)
            tracker.say(_line(step, self.config.steps, metrics))
            last = step + 1 == self.config.steps
            if last or (step + 1) % self.config.save_every == 0:
                self._save(step + 1)
        if (problem := self.snapshots.wait()) is not None:
            tracker.say(f"drafter: {problem}")

    def step(self, step: int, tracker: Tracker) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One RL step. Returns its metrics and every rank's record."""
        clock = _Clock(self.accelerator)
        mine = self.task.batch(step, self.config.rollout.prompts_per_step)[
            self.accelerator.process_index :: self.accelerator.num_processes
        ]
        self.coordinator.begin(step)
        with clock.phase("rollout"):
            progress = tracker.rollout_progress(step, len(mine) * self.config.rollout.group_size)

            def on_step(record: StepRecord) -> None:
                self.coordinator.beat()
                progress(record)

            done = self.worker.rollout(mine, step, on_step)
            progress.close()
        with clock.phase("score"):
            rewards = self._score(done)
            advantages = group_advantages(torch.tensor(rewards), self.config.rollout.group_size, self.config.update.scale_by_std)
            self.worker.learn_from(done, rewards)
        with clock.phase("drafter"):
            learner = self._train_drafter(tracker)
        with clock.phase("wait"):
            self.accelerator.wait_for_everyone()
        if self.config.measure.plain_every and (step + 1) % self.config.measure.plain_every == 0:
            with clock.phase("measure"):
                self.worker.measure_plain(done)
                self.accelerator.wait_for_everyone()
        with clock.phase("update"):
            release_freed_memory()  # what rollouts and drafter left in pieces
            update = self.updater.run(_scored(done, advantages.tolist()), step)
        with clock.phase("sync"):
            self.worker.engine.refresh_weights()
            self._share_drafter(done, learner, step, tracker)
        record = rank_record(done, rewards, advantages.tolist(), learner, update, clock.spans)
        ranks = gather_object([record])
        self._write_samples(step, done, rewards)
        return step_metrics(ranks, self.config.rollout.group_size), ranks

    def _score(self, done: RankRollouts) -> list[float]:
        texts = [str(self.tokenizer.decode(r.token_ids, skip_special_tokens=True)) for r in done.rollouts]
        questions = [p.question for p in done.problems]
        scores = self.reward(prompts=questions, completions=texts, problem=done.problems, answer=[p.answer for p in done.problems])
        return [0.0 if r.finish_reason is FinishReason.FAILED else s for r, s in zip(done.rollouts, scores, strict=True)]

    def _train_drafter(self, tracker: Tracker) -> LearnerReport:
        """While other ranks decode, or for whole passes, as the recipe has it."""
        self.coordinator.idle()
        if self.config.drafter.schedule == "never":
            return LearnerReport()
        if self.config.drafter.schedule == "always":
            return self.worker.train_drafter(lambda: False)
        self.coordinator.wait_until_training()
        report = self.worker.train_drafter(lambda: not self.coordinator.may_train())
        if (problem := self.coordinator.take_problem()) is not None:
            tracker.say(f"drafter: {problem}")
        return report

    def _share_drafter(self, done: RankRollouts, report: LearnerReport, step: int, tracker: Tracker) -> None:
        """Every rank drafts with the mean of what ranks have approved, by their updates. The first step's rollouts choose the
        vocabulary."""
        if self.worker.needs_drafter:
            self.worker.create_drafter(self._vocabulary_of(done))
            return
        if self.worker.spot is None:
            return
        updates = sum(gather_object([report.approved]))
        if updates:
            share = report.approved / updates
            parameters = self.worker.spot.approved.parameters()
            self.worker.spot.adopt([self.accelerator.reduce(p.detach() * share, "sum") for p in parameters])
        every = self.config.drafter.vocabulary_every
        anew = every > 0 and (step + 1) % every == 0
        if anew:
            self.worker.change_vocabulary(self._vocabulary_of(done))
        if not updates and not anew:
            return
        problems = [self.worker.take_over_drafter()]
        if self.accelerator.is_main_process and self.config.drafter.snapshots:
            problems.append(self.snapshots.save(step + 1, self.worker.spot.serving, self.worker.spot.learner.optimizer))
            report.snapshot_seconds = self.snapshots.seconds
        for problem in problems:
            if problem is not None:
                tracker.say(f"drafter: {problem}")

    def _vocabulary_of(self, done: RankRollouts) -> torch.Tensor:
        """The draft vocabulary that serves all ranks' rollouts of this step best."""
        everywhere = gather_object([[*r.request.prompt_ids, *r.token_ids] for r in done.rollouts])
        return choose_vocabulary(everywhere, self.config.drafter.draft_vocab_size, self.worker.engine.runner.vocab_size)

    def _write_samples(self, step: int, done: RankRollouts, rewards: list[float]) -> None:
        """The first completion of each prompt of rank 0, to read what the policy does."""
        if not self.accelerator.is_main_process:
            return
        with (self.run_dir / "rollouts.jsonl").open("a", encoding="utf-8") as file:
            for i in range(0, len(done.rollouts), self.config.rollout.group_size):
                text = self.tokenizer.decode(done.rollouts[i].token_ids, skip_special_tokens=True)
                sample = {"step": step, "question": done.problems[i].question, "completion": text, "reward": rewards[i]}
                file.write(json.dumps(sample) + "\n")

    def _save(self, steps_done: int) -> None:
        if self.accelerator.is_main_process:
            spot = self.worker.spot
            save_checkpoint(
                self.run_dir,
                steps_done=steps_done,
                policy=self.policy,
                tokenizer_from=self.source,
                optimizer=self.optimizer,
                drafter=spot.serving if spot else None,
                drafter_optimizer=spot.learner.optimizer if spot else None,
                selector=self.worker.engine.speculation.selector.state(),
            )
        self.accelerator.wait_for_everyone()


class _Clock:
    """Phases of a step on a clock that the ranks of one machine share."""

    def __init__(self, accelerator: Accelerator) -> None:
        origin = [time.time()]
        broadcast_object_list(origin)
        self._origin = origin[0]
        self.spans: list[Span] = []

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        begin = time.time() - self._origin
        yield
        self.spans.append(Span(name, begin, time.time() - self._origin))


def _scored(done: RankRollouts, advantages: list[float]) -> list[Scored]:
    """Rollouts that enter the loss: those that were served."""
    return [
        Scored(r.request.prompt_ids, r.token_ids, r.logprobs, advantage, problem.key)
        for r, advantage, problem in zip(done.rollouts, advantages, done.problems, strict=True)
        if r.finish_reason is not FinishReason.FAILED
    ]


def starting_policy(config: RunConfig) -> Path:
    """The directory the run starts from.

    Raises:
        UserError: when a warm-up is wanted and has not been made.
    """
    if config.policy.warmup is None:
        return fetch_policy(config.policy.model)
    path = warmed_policy_path(config)
    if not path.is_dir():
        raise UserError(
            "policy.warmup: the warmed-up policy is not there yet; run python launch/warmup_policy.py with this recipe first"
        )
    return path


def _line(step: int, steps: int, m: dict[str, Any]) -> str:
    speedup = f"  {m['measure/rollout_speedup']:.2f}x plain" if "measure/rollout_speedup" in m else ""
    return (
        f"step {step + 1:>3}/{steps}  reward {m['reward/mean']:.3f}  length {m['length/mean']:.0f} (max {m['length/max']})  "
        f"accepted length {m['rollout/acceptance_length']:.2f}  rollout {m['rollout/seconds']:.1f} s  "
        f"update {m['time/update']:.1f} s{speedup}"
    )


def make_accelerator(config: RunConfig, timeout: timedelta) -> Accelerator:
    """The process group and precision of a run, from torchrun's environment. A rank that waits longer than ``timeout`` for another
    gives up with an error."""
    handlers = [DistributedDataParallelKwargs(gradient_as_bucket_view=True), InitProcessGroupKwargs(timeout=timeout)]
    return Accelerator(cpu=not torch.cuda.is_available(), mixed_precision=config.policy.mixed_precision, kwargs_handlers=handlers)


def write_config(config: RunConfig, run: Path) -> None:
    """Keeps the recipe, as resolved, with the run."""
    (run / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
