"""What ``--dry-run`` tries: a recipe's own settings on a tiny policy of the same kind, from rollouts to a
checkpoint.
"""

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

_TOKENS, _SAMPLES, _PROMPTS, _STEPS = (
    16,
    4,
    2,
    3,
)  # the first step chooses the drafter's vocabulary, the second trains it
_KEYS = {
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
}  # which keys of a recipe decide what a file does


class _Listener(Tracker):
    """Keeps what a run says, and shows nothing."""

    lines: list[str]

    def say(self, text: str) -> None:
        self.lines.append(text)


def try_tiny_step(config: RunConfig) -> str:
    """Runs a few tiny steps of a recipe in this process: rollouts, scores, update, drafter training, drafts,
    a checkpoint.

    Args:
        config: The recipe.

    Returns:
        What was tried, and what the run said of itself, in lines.

    Raises:
        UserError: when a step fails: why, and which keys have to do with it.
    """
    policy = policy_config(config.policy.model)
    if policy is None:
        return "no step was tried: the policy's configuration is not at hand"
    begin, own = time.monotonic(), cached_policy(config.policy.model)
    folder = Path(tempfile.mkdtemp(prefix="paceline-dry-run-"))
    try:
        try:
            write_tiny_copy(policy, own, folder / "policy")
        except Exception as error:  # whatever a model's own code does with sizes that it was never tried with
            return (
                f"no step was tried: a small {policy.model_type} cannot be made ({type(error).__name__}: "
                f"{one_line(error, 300)})"
            )
        tiny = _tiny_recipe(config, folder, own is not None)
        with _process_group(config), warnings.catch_warnings(), redirect_stdout(StringIO()):
            warnings.simplefilter("ignore")
            drafters, said = _run(tiny, folder / "run")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    tokenizer = "" if own is not None else ", with a tokenizer of characters, for its own is not at hand"
    done = (
        f"tried: {_STEPS} steps of {tiny.rollout.prompts_per_step} prompts × {tiny.rollout.group_size} "
        "samples of at most "
        f"{tiny.rollout.max_tokens} tokens on a random {policy.model_type} of {LAYERS} layers{tokenizer}: "
        "rollouts, scores, "
        f"update, {f'drafts by {drafters}, ' if drafters else ''}checkpoint; {time.monotonic() - begin:.0f} s"
    )
    left_out = ["rollout.vllm is not tried"] if config.rollout.vllm is not None else []
    return "\n".join([done, *left_out, *dict.fromkeys(said)])


def _run(tiny: RunConfig, run: Path) -> tuple[str, list[str]]:
    """Trains and drafts. Returns the drafters' names and what the run said."""
    run.mkdir()
    listener = _Listener(tiny, run, active=False)
    listener.lines = []
    try:
        accelerator = make_accelerator(tiny, timedelta(minutes=1))
        trainer = Trainer(tiny, run, accelerator, None, listener)
        trainer.run()
        drafters = _draft(trainer)
    except UserError as error:
        raise UserError(f"a tiny step of the recipe fails: {error}") from None
    except Exception as error:
        raise UserError(
            f"a tiny step of the recipe fails{_keys_of(error)}: {type(error).__name__}: "
            f"{one_line(error, 300)}"
        ) from None
    return ", ".join(drafters), [line for line in listener.lines if line.startswith(("reward:", "drafter:"))]


def _draft(trainer: Trainer) -> list[str]:
    """Decodes with every drafter once: a run chooses among them by measured times, which may leave some
    out.
    """
    engine = trainer.worker.engine
    problem = trainer.choice.choose(0, 1)[0]
    requests = trainer.worker.groups.requests([problem], step=0)[:2]
    short = [Request(r.prompt_ids, replace(r.params, max_tokens=8), r.seed) for r in requests]
    for name in engine.drafters:
        engine.use_strategy(Strategy(name, 2))
        engine.generate(short)
    return list(engine.drafters)


def _tiny_recipe(config: RunConfig, folder: Path, own_tokenizer: bool) -> RunConfig:
    """The recipe with what costs time made small, and nothing else changed."""
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
            # of so few made problems none may be held out, or all; evaluations make others
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
    """A group of this process alone, where the recipe shards and there is none."""
    if not config.scale.sharded or torch.distributed.is_initialized():
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    before = dict(os.environ)
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}  # DeepSpeed reads them beside the group
    torch.distributed.init_process_group(backend, store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()
        os.environ.clear()
        os.environ.update(before)


def _keys_of(error: BaseException) -> str:
    """Names the recipe's keys that decide what the innermost of our files on the traceback does; empty where
    none is known.
    """
    root = str(Path(__file__).parents[2])
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename.startswith(root):
            place = frame.filename[len(root) + 1 :]
            found = next((keys for prefix, keys in _KEYS.items() if place.startswith(prefix)), None)
            if found is not None:
                return f" ({found}; {place} line {frame.lineno})"
    return ""
