"""Tries a recipe's settings on a tiny policy of the same architecture, from rollouts to a checkpoint."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from datetime import timedelta
from io import StringIO
from pathlib import Path

import torch

from paceline.rl.config.run import RunConfig
from paceline.rl.dry_run.estimate import policy_config
from paceline.rl.dry_run.tiny_copy import LAYERS, write_tiny_copy
from paceline.rl.errors import UserError, one_line
from paceline.rl.models.policies import cached_policy
from paceline.rl.monitoring.tracker import Tracker
from paceline.rl.trainer import Trainer, make_accelerator
from paceline.rollout import Request, Strategy

_TOKENS, _SAMPLES, _PROMPTS = 16, 4, 2
_STEPS = 3  # the first chooses the drafter's vocabulary, the second trains the drafter
_KEYS = {  # the recipe keys that decide what a file does, by the beginning of its path
    "rl/rewards/shaping": "length",
    "rl/rewards/budgets": "length",
    "rl/rewards/registry": "length",
    "rl/rewards": "task.reward",
    "rl/tasks/prompts": "task.instruction, task.system",
    "rl/tasks": "task",
    "drafter_trainer": "drafter, with rollout.dtype and policy.mixed_precision",
    "rl/drafting/factory": "drafter, with rollout.dtype and policy.mixed_precision",
    "rl/drafting": "drafter",
    "rl/models/lora": "scale.lora",
    "rl/sharding": "scale",
    "rl/lengths": "length",
    "rl/generation/anytime": "length.anytime",
    "rl/learner/critic": "critic",
    "rl/learner": "update, with policy.mixed_precision",
    "rl/checkpointing": "checkpoints",
    "rollout/drafters": "speculation.drafters",
    "rollout/verify": "speculation.verifier",
    "rollout": "rollout, speculation",
}


class _RecordingTracker(Tracker):
    """Records the lines that a run prints and shows nothing."""

    lines: list[str]

    def say(self, text: str) -> None:
        """Records a line."""
        self.lines.append(text)


def try_tiny_step(config: RunConfig) -> str:
    """Runs a few tiny steps of a recipe in this process.

    They cover rollouts, rewards, the update, drafter training, drafting, and a checkpoint.

    Args:
        config: The recipe.

    Returns:
        Lines that say what was tried, and what the run printed about rewards and the drafter.

    Raises:
        UserError: If a step fails; the message gives the reason and the recipe keys involved.
    """
    policy = policy_config(config.policy.model)
    if policy is None:
        return "no step was tried: the policy's configuration is not on this machine"
    begin, cached = time.monotonic(), cached_policy(config.policy.model)
    folder = Path(tempfile.mkdtemp(prefix="paceline-dry-run-"))
    try:
        try:
            write_tiny_copy(policy, cached, folder / "policy")
        except Exception as error:  # model classes raise many types for sizes that nobody has tried
            return (
                f"no step was tried: a small {policy.model_type} cannot be made ({type(error).__name__}: "
                f"{one_line(error, 300)})"
            )
        tiny = _tiny_recipe(config, folder, cached is not None)
        with _process_group(config), warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            drafters, printed = _run(tiny, folder / "run")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    tokenizer = (
        "" if cached is not None else ", with a character tokenizer, since its own is not on this machine"
    )
    tried = (
        f"tried: {_STEPS} steps of {tiny.rollout.prompts_per_step} prompts × {tiny.rollout.group_size} "
        f"samples of at most {tiny.rollout.max_tokens} tokens on a random {policy.model_type} of {LAYERS} "
        f"layers{tokenizer}: rollouts, rewards, update, {f'drafts by {drafters}, ' if drafters else ''}"
        f"checkpoint; {time.monotonic() - begin:.0f} s"
    )
    not_tried = ["rollout.vllm is not tried"] if config.rollout.vllm is not None else []
    return "\n".join([tried, *not_tried, *dict.fromkeys(printed)])


def _run(tiny: RunConfig, run: Path) -> tuple[str, list[str]]:
    """Trains, then drafts with each drafter.

    Returns:
        The drafters' names, and what the run printed about rewards and the drafter.

    Raises:
        UserError: If a step fails.
    """
    run.mkdir()
    tracker = _RecordingTracker(tiny, run, active=False)
    tracker.lines = []
    try:
        accelerator = make_accelerator(tiny, timedelta(minutes=1))
        trainer = Trainer(tiny, run, accelerator, None, tracker)
        trainer.run()
        drafters = _draft(trainer)
    except UserError as error:
        raise UserError(f"a tiny step of the recipe fails: {error}") from None
    except Exception as error:
        raise UserError(
            f"a tiny step of the recipe fails{_involved_keys(error)}: {type(error).__name__}: "
            f"{one_line(error, 300)}"
        ) from None
    return ", ".join(drafters), [line for line in tracker.lines if line.startswith(("reward:", "drafter:"))]


def _draft(trainer: Trainer) -> list[str]:
    """Decodes once with every drafter, since a run chooses by measured times and may leave some out."""
    engine = trainer.worker.engine
    problem = trainer.choice.choose(0, 1)[0]
    requests = trainer.worker.groups.requests([problem], step=0)[:2]
    short = [Request(r.prompt_ids, replace(r.params, max_tokens=8), r.seed) for r in requests]
    for name in engine.drafters:
        engine.use_strategy(Strategy(name, 2))
        engine.generate(short)
    return list(engine.drafters)


def _tiny_recipe(config: RunConfig, folder: Path, own_tokenizer: bool) -> RunConfig:
    """Returns the recipe with small values for what costs time; everything else stays."""
    r, s, d = config.rollout, config.speculation, config.drafter
    policy, anytime = str(folder / "policy"), config.length.anytime
    rollout = replace(
        r,
        prompts_per_step=_PROMPTS,
        group_size=min(r.group_size, _SAMPLES) if r.tree is None else r.group_size,
        max_tokens=min(r.max_tokens, _TOKENS),
        max_context=r.max_context if own_tokenizer else 8192,
        max_slots=min(r.max_slots, _PROMPTS * _SAMPLES),
        kv_memory_gb=None,
        segment_tokens=None if r.segment_tokens is None else min(r.segment_tokens, _TOKENS // 2),
        tree=None if r.tree is None else replace(r.tree, segment_tokens=min(r.tree.segment_tokens, 4)),
        vllm=None,
    )
    return replace(
        config,
        out=str(folder / "run"),
        steps=_STEPS,
        save_every=_STEPS,
        policy=replace(config.policy, model=policy, warmup=None),
        task=replace(
            config.task,
            size=min(config.task.size, 8),
            # a share of so few generated problems may be none or all; evaluations generate others anyway
            heldout=0.0 if config.task.source == "reasoning_gym" else config.task.heldout,
            chat_template_kwargs=config.task.chat_template_kwargs if own_tokenizer else {},
        ),
        rollout=rollout,
        speculation=replace(s, draft_model=None if s.draft_model is None else policy),
        update=replace(config.update, minibatches=min(config.update.minibatches, 2)),
        length=config.length
        if anytime is None
        else replace(config.length, anytime=replace(anytime, answer_tokens=4)),
        drafter=replace(
            d,
            start=None,
            draft_vocab_size=min(d.draft_vocab_size, 48),
            schedule="never" if d.schedule == "never" else "always",
            snapshots=0,
        ),
        evaluation=replace(
            config.evaluation,
            prompts=min(config.evaluation.prompts, _PROMPTS),
            samples=min(config.evaluation.samples, _SAMPLES),
        ),
        measure=replace(config.measure, plain_every=min(config.measure.plain_every, 1)),
        tracking=replace(config.tracking, wandb="disabled", tensorboard=False),
    )


@contextmanager
def _process_group(config: RunConfig) -> Iterator[None]:
    """Creates a process group of this process alone if the recipe shards and there is no group yet."""
    if not config.scale.sharded or torch.distributed.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    before = dict(os.environ)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed reads these as well
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def _involved_keys(error: BaseException) -> str:
    """Returns the recipe keys and the line of the innermost of our files on the traceback, in parentheses.

    Files without known keys are skipped; the text is empty if there is no other.
    """
    root = str(Path(__file__).parents[2])
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(root):
            file = frame.filename[len(root) + 1 :]
            keys = next((keys for prefix, keys in _KEYS.items() if file.startswith(prefix)), None)
            if keys is not None:
                return f" ({keys}; {file} line {frame.lineno})"
    return ""
