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
    load_selector_state,
    restore_optimizer,
    save_checkpoint,
)
from rl.shared_drafter import SharedDrafter
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
        tracker: Where metrics and lines go.
    """

    def __init__(
        self, config: RunConfig, run: Path, accelerator: Accelerator, checkpoint: Checkpoint | None, tracker: Tracker
    ) -> None:
        self.config, self.run_dir, self.accelerator, self.tracker = config, run, accelerator, tracker
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
        self.drafter = SharedDrafter(config.drafter, self.worker, accelerator, run, tracker.say)
        self.updater, self.optimizer = self._build_updater()
        self.first_step = 0
        if checkpoint is not None:
            self._resume(checkpoint)
        else:
            self.drafter.start()

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

    def _resume(self, checkpoint: Checkpoint) -> None:
        restore_optimizer(self.optimizer, checkpoint.path / "optimizer")
        self.drafter.resume(checkpoint)
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

    def run(self) -> None:
        """All remaining steps."""
        for step in range(self.first_step, self.config.steps):
            metrics, timeline = self.step(step)
            self.tracker.log(step, metrics, timeline)
            self.tracker.say(_line(step, self.config.steps, metrics))
            last = step + 1 == self.config.steps
            if last or (step + 1) % self.config.save_every == 0:
                self._save(step + 1)
        self.drafter.finish()

    def step(self, step: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
        """One RL step. Returns its metrics and every rank's record."""
        clock = _Clock(self.accelerator)
        mine = self.task.batch(step, self.config.rollout.prompts_per_step)[
            self.accelerator.process_index :: self.accelerator.num_processes
        ]
        self.drafter.coordinator.begin(step)
        with clock.phase("rollout"):
            progress = self.tracker.rollout_progress(step, len(mine) * self.config.rollout.group_size)

            def on_step(record: StepRecord) -> None:
                self.drafter.coordinator.beat()
                progress(record)

            done = self.worker.rollout(mine, step, on_step)
            progress.close()
        with clock.phase("score"):
            rewards = self._score(done)
            advantages = group_advantages(torch.tensor(rewards), self.config.rollout.group_size, self.config.update.scale_by_std)
        with clock.phase("drafter"):
            learner = self.drafter.train(done, rewards)
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
            self.drafter.share(done, learner, step)
        record = rank_record(done, rewards, advantages.tolist(), learner, update, clock.spans)
        ranks = gather_object([record])
        self._write_samples(step, done, rewards)
        return step_metrics(ranks, self.config.rollout.group_size), ranks

    def _score(self, done: RankRollouts) -> list[float]:
        texts = [str(self.tokenizer.decode(r.token_ids, skip_special_tokens=True)) for r in done.rollouts]
        questions = [p.question for p in done.problems]
        scores = self.reward(prompts=questions, completions=texts, problem=done.problems, answer=[p.answer for p in done.problems])
        return [0.0 if r.finish_reason is FinishReason.FAILED else s for r, s in zip(done.rollouts, scores, strict=True)]

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
