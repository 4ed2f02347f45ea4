"""Rollouts for TRL's trainers: one import, one argument.

``GRPOTrainer(..., rollout_func=paceline_rollouts())``, and the same for RLOO with the `RLOOTrainer` of this file, which is TRL's
with that argument. Length-aware rewards for ``reward_funcs`` are in `rl.rewards.registry`.
"""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import trl
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from rl.errors import UserError
from rl.integrations.host import HostedRollouts, host_config, step_report
from rl.integrations.policy import HostPolicy
from rl.prompts import stable_seed
from rl.shaping import answer_start
from rollout import Request, Rollout

_LOG = logging.getLogger("paceline")
_ROOM_FOR_PROMPTS = 2048
_FOLDER = "paceline"
_TEXT_ONLY = "paceline: rollouts are of text; these prompts have images"


def paceline_rollouts(*, answer: str = "Answer:", **sections: dict[str, Any]) -> PacelineRollouts:
    """A ``rollout_func`` for TRL's trainers, losslessly speculated, with a drafter that is trained on the way.

    Temperature, top-k, top-p, lengths and precision are those of the trainer's arguments. The drafter, its optimizer and what the
    bandit has learned are kept in each checkpoint's ``paceline`` folder; the drafter is exported to
    ``<output_dir>/paceline/drafter`` when training ends. Metrics named ``paceline/...`` join the trainer's own.

    Args:
        answer: Text that begins the answer of a completion, for rewards that read entropies (PEAR).
        sections: ``speculation``, ``drafter`` and ``measure`` as in a recipe, and of ``rollout`` the keys ``max_context`` (the
            longest completion and 2,048 tokens of prompt), ``max_slots``, ``dtype`` and ``kv_memory_gb``. On one rank, which never
            idles, no drafter is trained unless ``drafter={"schedule": "always"}`` or a ``start`` says so.

    Raises:
        UserError: at the first rollout, for sections that are wrong and trainers that ask for what the engine does not do.
    """
    return PacelineRollouts(answer, sections)


class PacelineRollouts(TrainerCallback):
    """What `paceline_rollouts` makes: the rollout function, and the callback that follows the trainer's checkpoints."""

    def __init__(self, answer: str, sections: dict[str, Any]) -> None:
        self._answer, self._sections = answer, sections
        self._hosted: HostedRollouts | None = None
        self._entropies = False
        self._refreshed: tuple[int, int] | None = None

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """One completion of each prompt, in TRL's ``rollout_func`` contract: ``prompt_ids``, ``completion_ids``, ``logprobs``.

        Args:
            prompts: Texts or conversations of this rank, repeated for the samples of a group.
            trainer: Its `GRPOTrainer`.
        """
        prompt_ids, images, _ = trainer._tokenize_prompts(prompts)
        if images:
            raise UserError(_TEXT_ONLY)
        rollouts = self.complete(prompt_ids, trainer)
        found: dict[str, Any] = {
            "prompt_ids": prompt_ids,
            "completion_ids": [r.token_ids for r in rollouts],
            "logprobs": [r.logprobs for r in rollouts],
        }
        if self._entropies:
            found["entropies"] = [r.entropies for r in rollouts]
            found["answers"] = [answer_start(r.token_ids, self._answer, trainer.processing_class) for r in rollouts]
        return found

    def complete(self, prompt_ids: Sequence[Sequence[int]], trainer: Any) -> list[Rollout]:
        """The rollouts of token ids, in order. Collective."""
        hosted = self._hosted if self._hosted is not None else self._start(trainer)
        step = int(trainer.state.global_step)
        calls = 0 if self._refreshed is None or self._refreshed[0] != step else self._refreshed[1] + 1
        if calls == 0:
            hosted.refresh()
        self._refreshed = (step, calls)
        requests = self._requests(prompt_ids, trainer, f"{step}/{calls}")
        if not trainer.model.training:
            return hosted.rollouts(requests).rollouts
        done, report = hosted.step(requests)
        for name, value in step_report(done, report).items():
            trainer._log_metric(name, value)
        return done.rollouts

    def _requests(self, prompt_ids: Sequence[Sequence[int]], trainer: Any, moment: str) -> list[Request]:
        """Seeds follow from the trainer's seed, the moment, the rank, the prompt, and which of its samples it is."""
        assert self._hosted is not None
        rank, seen, made = trainer.accelerator.process_index, Counter[str](), []
        for ids in prompt_ids:
            key = hashlib.blake2b(repr(list(ids)).encode(), digest_size=12).hexdigest()
            seed = stable_seed(trainer.args.seed, 0, f"{moment}/{rank}/{key}", seen[key])
            made.append(Request(list(ids), self._hosted.worker.params, seed, group=key))
            seen[key] += 1
        return made

    def _start(self, trainer: Any) -> HostedRollouts:
        _refuse_what_differs(trainer)
        args, accelerator = trainer.args, trainer.accelerator
        longest = trainer.max_completion_length
        most = getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None) or longest + _ROOM_FOR_PROMPTS
        from_host = {
            "out": str(Path(args.output_dir) / _FOLDER),
            "seed": args.seed,
            "steps": max(int(trainer.state.max_steps), 1),
            "policy": {"mixed_precision": "bf16" if args.bf16 else "no"},
            "rollout": {
                "group_size": max(trainer.num_generations, 2),
                "max_tokens": longest,
                "max_context": min(longest + _ROOM_FOR_PROMPTS, most),
                "temperature": float(trainer.temperature),
                "top_k": max(trainer.top_k or 0, 0),
                "top_p": float(trainer.top_p),
                "dtype": "bfloat16" if args.bf16 else "float32",
            },
        }
        config = host_config(self._sections, from_host, alone=accelerator.num_processes == 1)
        model = accelerator.unwrap_model(trainer.model)
        if config.rollout.max_context > most:
            raise UserError(
                f"paceline: rollout.max_context is {config.rollout.max_context}, the policy reads {most} tokens at most"
            )
        policy = HostPolicy(model, getattr(torch, config.rollout.dtype), accelerator.device)
        tokenizer = getattr(trainer.processing_class, "tokenizer", trainer.processing_class)
        hosted = HostedRollouts(config, policy, tokenizer, accelerator, _LOG.warning)
        self._entropies = any(getattr(f, "needs_entropies", False) for f in trainer.reward_funcs)
        hosted.engine.collect_entropies = self._entropies
        self._hosted = hosted
        if trainer.state.global_step:
            self._resume(trainer)
        trainer.add_callback(self)
        return hosted

    def _resume(self, trainer: Any) -> None:
        assert self._hosted is not None
        named = trainer.args.resume_from_checkpoint
        places = [Path(named)] if isinstance(named, str) else []
        places.append(Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}")
        folder = next((p / _FOLDER for p in places if (p / _FOLDER / "state.json").is_file()), None)
        if folder is None:
            _LOG.warning(f"{places[-1]} holds no drafter of a run with paceline: a new one is made")
        else:
            self._hosted.load(folder)

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The trainer has written a checkpoint: the drafter joins it."""
        if self._hosted is not None and state.is_world_process_zero:
            self._hosted.save(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _FOLDER)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """The drafter is exported."""
        if self._hosted is not None:
            self._hosted.finish()


class RLOOTrainer(trl.RLOOTrainer):
    """TRL's, with the ``rollout_func`` of its `GRPOTrainer`; it takes what `paceline_rollouts` makes."""

    def __init__(self, *args: Any, rollout_func: PacelineRollouts | None = None, **kwargs: Any) -> None:
        self.rollout_func = rollout_func
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any) -> list[list[int]]:
        if self.rollout_func is None:
            found: list[list[int]] = super()._generate_single_turn(prompt_ids, images, multimodal_fields)
            return found
        if images is not None:
            raise UserError(_TEXT_ONLY)
        return [r.token_ids for r in self.rollout_func.complete(prompt_ids, self)]


def _refuse_what_differs(trainer: Any) -> None:
    """What TRL's own generation would do and the engine does not."""
    args = trainer.args
    asked = {
        "use_vllm": bool(getattr(args, "use_vllm", False)),
        "tools": bool(getattr(trainer, "tools", None)),
        "environment_factory": bool(getattr(trainer, "environment_factories", None)),
        "min_p": bool(getattr(args, "min_p", None)),
        "repetition_penalty": getattr(args, "repetition_penalty", 1.0) not in (None, 1.0),
        "generation_kwargs": bool(getattr(args, "generation_kwargs", None)),
    }
    wrong = [name for name, wanted in asked.items() if wanted]
    if wrong:
        raise UserError(f"paceline: the engine does not do {', '.join(wrong)}: leave it out, or train without rollout_func")
