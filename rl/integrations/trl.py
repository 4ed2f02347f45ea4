"""Rollouts for TRL's trainers: one import, one argument.

``GRPOTrainer(..., rollout_func=paceline_rollouts())``, and the same for RLOO with the `RLOOTrainer` of this
file, which is TRL's with that argument. Length-aware rewards for ``reward_funcs`` are in
`paceline.rl.rewards.registry`. docs/trl.md has what is read from the trainer and what is refused,
docs/multi_turn.md conversations with an environment.
"""

from __future__ import annotations

import hashlib
import logging
import weakref
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import trl
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from paceline.rl.errors import UserError
from paceline.rl.integrations.host import HostedRollouts, any_rank, host_config, step_report
from paceline.rl.integrations.policy import HostPolicy
from paceline.rl.integrations.trl_arguments import check_arguments, check_trainer
from paceline.rl.integrations.turns import Conversation, Environment, answer_ids
from paceline.rl.tasks.answers import answer_start
from paceline.rl.tasks.prompts import stable_seed
from paceline.rollout import Request, Rollout

_LOG = logging.getLogger("paceline")
_ROOM_FOR_PROMPTS = 2048
_FOLDER = "paceline"
_TEXT_ONLY = "paceline: rollouts are of text; these prompts have images"


def paceline_rollouts(
    args: Any = None, *, answer: str = "Answer:", **sections: dict[str, Any]
) -> PacelineRollouts:
    """A ``rollout_func`` for TRL's trainers, losslessly speculated, with a drafter that is trained on the
    way.

    Temperature, top-k, top-p, lengths and precision are those of the trainer's arguments. The drafter, its
    optimizer and what the bandit has learned are kept in each checkpoint's ``paceline`` folder; the drafter
    is exported to ``<output_dir>/paceline/drafter`` when training ends. Metrics named ``paceline/...`` join
    the trainer's own.

    Args:
        args: The trainer's `GRPOConfig` or `RLOOConfig`, to have it checked here, before a model is loaded;
            otherwise it is checked at the first rollout. What is not honoured is refused, never passed over.
        answer: Text that begins the answer of a completion, for rewards that read entropies (PEAR).
        sections: ``speculation``, ``drafter`` and ``measure`` as in a recipe, and of ``rollout`` the keys
            ``max_context`` (the longest completion and 2,048 tokens of prompt), ``max_slots``, ``dtype``,
            ``kv_memory_gb`` and ``stop_strings``. On one rank, which never idles, no drafter is trained
            unless ``drafter={"schedule": "always"}`` or a ``start`` says so.

    Raises:
        UserError: for sections that are wrong and for arguments that ask for what the engine does not do; at
            the first rollout, for what only the trainer as a whole tells.
    """
    host_config(sections, _ANY_HOST, alone=False)
    if args is not None:
        check_arguments(args)
    return PacelineRollouts(answer, sections)


_ANY_HOST = {"out": "unused", "rollout": {"max_tokens": 1}}  # enough to look at what the user wrote


class PacelineRollouts(TrainerCallback):
    """What `paceline_rollouts` makes: the rollout function, and the callback that follows the trainer's
    checkpoints.

    Before each generation it looks at all of the policy's weights (`paceline.rl.integrations.fingerprint`)
    and renews the engine's copies if anything has changed, whoever changed it. Given to another trainer, or
    when the policy's modules were replaced, it builds its engine anew.
    """

    def __init__(self, answer: str, sections: dict[str, Any]) -> None:
        self._answer, self._sections = answer, sections
        self._hosted: HostedRollouts | None = None
        self._trainer: weakref.ref[Any] | None = None
        self._entropies = False
        self._calls: dict[str, tuple[int, int]] = {}

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """One completion of each prompt, in TRL's ``rollout_func`` contract: ``prompt_ids``,
        ``completion_ids``, ``logprobs``.

        Args:
            prompts: Texts or conversations of this rank, repeated for the samples of a group.
            trainer: Its `GRPOTrainer`.
        """
        prompt_ids = self._tokenized(prompts, trainer)
        rollouts = self.complete(prompt_ids, trainer)
        found: dict[str, Any] = {
            "prompt_ids": prompt_ids,
            "completion_ids": [r.token_ids for r in rollouts],
            "logprobs": [r.logprobs for r in rollouts],
        }
        if self._entropies:
            found["entropies"] = [r.entropies for r in rollouts]
            found["answers"] = [
                answer_start(r.token_ids, self._answer, trainer.processing_class) for r in rollouts
            ]
        return found

    def converse(
        self,
        prompts: list[Any],
        trainer: Any,
        environment: Environment,
        turns: int,
        turn_tokens: int | None = None,
    ) -> dict[str, Any]:
        """Plays conversations with an environment, in TRL's ``rollout_func`` contract with ``env_mask``: see
        docs/multi_turn.md.

        A conversation ends when the environment returns None, after ``turns`` of the policy's turns, or where
        the trainer's ``max_completion_length``, which counts both sides' tokens, leaves no room for another.
        Keys and values are kept between
        turns. Collective: ranks play on together until the last conversation of all has ended.

        Args:
            prompts: Texts or conversations of this rank, repeated for the samples of a group.
            trainer: Its `GRPOTrainer`.
            environment: Called after each of the policy's turns, in order of the prompts. Returns a text,
                token ids or chat messages to answer with, or None to end the conversation; after the last
                turn it is not read.
            turns: Most turns of the policy's, at least 1.
            turn_tokens: Most tokens of one turn, at least 1; None leaves what ``max_completion_length``
                leaves.

        Returns:
            ``prompt_ids``, ``completion_ids``, ``logprobs``, ``env_mask``, one list for each prompt, and a
            column for each key that the environment has written to `Conversation.columns` (None where it has
            not).

        Raises:
            UserError: for turns that are no count, answers of another type, and rewards that read entropies.
        """
        for name, count in {"turns": turns, "turn_tokens": 1 if turn_tokens is None else turn_tokens}.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise UserError(f"paceline: {name} is {count!r}: write a count of at least 1")
        if any(getattr(f, "needs_entropies", False) for f in trainer.reward_funcs):
            raise UserError(
                "paceline: rewards that read entropies judge one turn: use another reward with converse()"
            )
        talks = [
            Conversation(p, list(ids))
            for p, ids in zip(prompts, self._tokenized(prompts, trainer), strict=True)
        ]
        try:
            self._take_turns(talks, trainer, environment, turns, turn_tokens)
        finally:
            if self._hosted is not None:
                self._hosted.engine.kept.clear()
        names = {name: None for talk in talks for name in talk.columns}
        found = {
            name: [getattr(talk, name) for talk in talks]
            for name in ("prompt_ids", "completion_ids", "logprobs", "env_mask")
        }
        return {**{name: [talk.columns.get(name) for talk in talks] for name in names}, **found}

    def _take_turns(
        self,
        talks: list[Conversation],
        trainer: Any,
        environment: Environment,
        turns: int,
        turn_tokens: int | None,
    ) -> None:
        """Plays until every conversation is over, or its turns are. Collective."""
        for turn in range(turns):
            going = [talk for talk in talks if not talk.finished]
            if not any_rank(trainer.accelerator, bool(going)):
                break
            longest = trainer.max_completion_length if turn_tokens is None else turn_tokens
            room = [min(longest, trainer.max_completion_length - len(talk.completion_ids)) for talk in going]
            rollouts = self.complete([talk.token_ids for talk in going], trainer, max_tokens=room, keep=True)
            for talk, rollout in zip(going, rollouts, strict=True):
                self._take_turn(talk, rollout, trainer, environment, last=turn + 1 == turns)

    def _take_turn(
        self, talk: Conversation, rollout: Rollout, trainer: Any, environment: Environment, last: bool
    ) -> None:
        """Adds a turn and, unless it is the conversation's last one, what the environment answers."""
        tokenizer = _tokenizer_of(trainer)
        talk.add_turn(rollout, tokenizer)
        answer = environment(talk)
        talk.finished = True
        if answer is None or last:
            return
        ids = answer_ids(tokenizer, answer, rollout.token_ids[-1], trainer.chat_template_kwargs)
        if len(talk.completion_ids) + len(ids) < trainer.max_completion_length:
            talk.add_answer(ids)
            talk.finished = False

    def complete(
        self,
        prompt_ids: Sequence[Sequence[int]],
        trainer: Any,
        *,
        max_tokens: Sequence[int] | None = None,
        keep: bool = False,
    ) -> list[Rollout]:
        """The rollouts of token ids, in order. Collective: every rank calls it equally often, with an empty
        list where it has none.

        Args:
            prompt_ids: Of this rank.
            trainer: Its trainer.
            max_tokens: The longest completion of each; None for the trainer's ``max_completion_length``.
            keep: Keeps keys and values of these rollouts for later calls whose prompts begin with the same
                tokens, until the weights change. Takes as much memory again as the engine's cache at most.
        """
        hosted = self._host(trainer)
        hosted.refresh()
        hosted.engine.kept.most_tokens = hosted.engine.runner.cache.tokens if keep else 0
        requests = self._requests(prompt_ids, trainer, max_tokens)
        if not trainer.model.training:
            return hosted.rollouts(requests).rollouts
        done, report = hosted.step(requests)
        for name, value in step_report(done, report).items():
            trainer._log_metric(name, value)
        return done.rollouts

    def _tokenized(self, prompts: list[Any], trainer: Any) -> list[list[int]]:
        ids, images, _ = trainer._tokenize_prompts(prompts)
        if images:
            raise UserError(_TEXT_ONLY)
        return list(ids)

    def _requests(
        self, prompt_ids: Sequence[Sequence[int]], trainer: Any, max_tokens: Sequence[int] | None
    ) -> list[Request]:
        """Seeds follow from the trainer's seed, the moment, the rank, the prompt, and which of its samples it
        is.
        """
        assert self._hosted is not None
        params = replace(self._hosted.worker.params, **_sampling(trainer))
        limits = [params.max_tokens] * len(prompt_ids) if max_tokens is None else max_tokens
        moment, rank, seen = self._moment(trainer), trainer.accelerator.process_index, Counter[str]()
        made = []
        for ids, limit in zip(prompt_ids, limits, strict=True):
            key = hashlib.blake2b(repr(list(ids)).encode(), digest_size=12).hexdigest()
            seed = stable_seed(trainer.args.seed, 0, f"{moment}/{rank}/{key}", seen[key])
            made.append(Request(list(ids), replace(params, max_tokens=limit), seed, group=key))
            seen[key] += 1
        return made

    def _moment(self, trainer: Any) -> str:
        """Names this call by the trainer's step and how many there were in it. Evaluations are counted apart,
        so that a run that is resumed after one draws what it would have drawn.
        """
        mode, step = "" if trainer.model.training else "/evaluation", int(trainer.state.global_step)
        before = self._calls.get(mode)
        calls = before[1] + 1 if before is not None and before[0] == step else 0
        self._calls[mode] = step, calls
        return f"{step}/{calls}{mode}"

    def _host(self, trainer: Any) -> HostedRollouts:
        """The engine on the policy that the trainer has now."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        known = self._trainer is not None and self._trainer() is trainer
        if self._hosted is not None and known and self._hosted.policy.reads(model):
            return self._hosted
        earlier = self._hosted if known else None
        self._hosted, self._trainer = self._start(trainer, model), weakref.ref(trainer)
        if earlier is not None:
            _LOG.warning(
                "the policy's modules were replaced: the engine is built anew, and goes on with its drafter"
            )
            self._hosted.take_over(earlier)
        elif trainer.state.global_step:
            self._resume(trainer)
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self._hosted

    def _start(self, trainer: Any, model: torch.nn.Module) -> HostedRollouts:
        check_trainer(trainer, model)
        args, accelerator = trainer.args, trainer.accelerator
        longest = trainer.max_completion_length
        most = (
            getattr(trainer.model.config.get_text_config(), "max_position_embeddings", None)
            or longest + _ROOM_FOR_PROMPTS
        )
        from_host = {
            "out": str(Path(args.output_dir) / _FOLDER),
            "seed": args.seed,
            "steps": max(int(trainer.state.max_steps), 1),
            "policy": {"mixed_precision": "bf16" if args.bf16 else "no"},
            "rollout": {
                **_sampling(trainer),
                "group_size": max(trainer.num_generations, 2),
                "max_context": min(longest + _ROOM_FOR_PROMPTS, most),
                "dtype": "bfloat16" if args.bf16 else "float32",
            },
        }
        config = host_config(self._sections, from_host, alone=accelerator.num_processes == 1)
        if config.rollout.max_context > most:
            raise UserError(
                f"paceline: rollout.max_context is {config.rollout.max_context}, the policy reads {most} "
                "tokens at most"
            )
        policy = HostPolicy(model, getattr(torch, config.rollout.dtype), accelerator.device)
        hosted = HostedRollouts(config, policy, _tokenizer_of(trainer), accelerator, _LOG.warning)
        self._entropies = any(getattr(f, "needs_entropies", False) for f in trainer.reward_funcs)
        hosted.engine.collect_entropies = self._entropies
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

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The trainer has written a checkpoint: the drafter joins it."""
        if self._hosted is not None and state.is_world_process_zero:
            self._hosted.save(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _FOLDER)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
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


def _tokenizer_of(trainer: Any) -> Any:
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def _sampling(trainer: Any) -> dict[str, Any]:
    """Returns how the trainer samples at the moment, by the names of `SamplingParams` and of a recipe's
    ``rollout``.
    """
    return {
        "temperature": float(trainer.temperature),
        "top_k": max(trainer.top_k or 0, 0),
        "top_p": float(trainer.top_p),
        "max_tokens": trainer.max_completion_length,
    }
