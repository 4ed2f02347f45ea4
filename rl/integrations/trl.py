"""Provides rollouts to TRL's trainers with one import and one argument.

Write ``GRPOTrainer(..., rollout_func=paceline_rollouts())``. For RLOO, use the `RLOOTrainer` of this file,
which adds the argument to TRL's. Length-aware rewards for ``reward_funcs`` are in
`paceline.rl.rewards.registry`. docs/trl.md lists what is read from the trainer and what is rejected;
docs/multi_turn.md describes conversations with an environment.
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
_ROOM_FOR_PROMPTS = 2048  # tokens; added to the longest completion for the default max_context
_FOLDER = "paceline"
_TEXT_ONLY = "paceline: rollouts support text only, and these prompts have images: use prompts without images"


def paceline_rollouts(
    args: Any = None, *, answer: str = "Answer:", **sections: dict[str, Any]
) -> PacelineRollouts:
    """Returns a ``rollout_func`` for TRL's trainers with lossless speculation and online drafter training.

    Temperature, top-k, top-p, lengths and precision come from the trainer's arguments. Each checkpoint's
    ``paceline`` folder stores the drafter, its optimizer and the bandit's state. The drafter is exported to
    ``<output_dir>/paceline/drafter`` when training ends. Metrics named ``paceline/...`` join the trainer's.

    Args:
        args: The trainer's `GRPOConfig` or `RLOOConfig`, which is then checked here, before a model is
            loaded, instead of at the first rollout. Settings that cannot be honoured are rejected, never
            ignored.
        answer: Text that begins the answer of a completion, for rewards that read entropies (PEAR).
        sections: The recipe's sections ``speculation``, ``drafter`` and ``measure``, and of ``rollout`` the
            keys ``max_context`` (default: the longest completion and 2,048 tokens of prompt), ``max_slots``,
            ``dtype``, ``kv_memory_gb`` and ``stop_strings``. A single rank never idles, so it trains no
            drafter unless ``drafter={"schedule": "always"}`` or a ``start`` asks for it.

    Raises:
        UserError: If a section is invalid, or an argument asks for what the engine does not support. What
            depends on the trainer as a whole is checked at the first rollout.
    """
    host_config(sections, _PLACEHOLDER_HOST, alone=False)
    if args is not None:
        check_arguments(args)
    return PacelineRollouts(answer, sections)


# The least that a host has to provide, to check the user's sections before there is a trainer.
_PLACEHOLDER_HOST = {"out": "unused", "rollout": {"max_tokens": 1}}


class PacelineRollouts(TrainerCallback):
    """Generates rollouts for a TRL trainer, and saves the drafter with the trainer's checkpoints.

    Use it as the trainer's ``rollout_func``; it adds itself to the trainer's callbacks. Before each
    generation it hashes all weights of the policy (`paceline.rl.integrations.fingerprint`) and refreshes the
    engine's copies if anything has changed. It builds a new engine if it is passed to another trainer or the
    policy's modules were replaced.

    Args:
        answer: Text that begins the answer of a completion.
        sections: Sections as in `paceline_rollouts`.
    """

    def __init__(self, answer: str, sections: dict[str, Any]) -> None:
        self._answer, self._sections = answer, sections
        self._hosted: HostedRollouts | None = None
        self._trainer: weakref.ref[Any] | None = None
        self._entropies = False
        self._calls: dict[str, tuple[int, int]] = {}

    def __call__(self, prompts: list[Any], trainer: Any) -> dict[str, Any]:
        """Generates one completion of each prompt, as TRL's ``rollout_func`` contract asks. Collective.

        Args:
            prompts: This rank's texts or conversations, repeated for the samples of a group.
            trainer: The `GRPOTrainer` that calls.

        Returns:
            The columns ``prompt_ids``, ``completion_ids`` and ``logprobs``; also ``entropies`` and
            ``answers`` if a reward function reads entropies.
        """
        prompt_ids = self._tokenized(prompts, trainer)
        rollouts = self.complete(prompt_ids, trainer)
        columns: dict[str, Any] = {
            "prompt_ids": prompt_ids,
            "completion_ids": [r.token_ids for r in rollouts],
            "logprobs": [r.logprobs for r in rollouts],
        }
        if self._entropies:
            columns["entropies"] = [r.entropies for r in rollouts]
            columns["answers"] = [
                answer_start(r.token_ids, self._answer, trainer.processing_class) for r in rollouts
            ]
        return columns

    def converse(
        self,
        prompts: list[Any],
        trainer: Any,
        environment: Environment,
        turns: int,
        turn_tokens: int | None = None,
    ) -> dict[str, Any]:
        """Plays conversations with an environment, as TRL's ``rollout_func`` contract with ``env_mask`` asks.

        See docs/multi_turn.md. A conversation ends when the environment returns None, after ``turns`` turns
        of the policy, or if the trainer's ``max_completion_length``, which counts the tokens of both sides,
        leaves no room for another turn. Keys and values are cached between turns. Collective: all ranks
        continue until the last conversation of all ranks has ended.

        Args:
            prompts: This rank's texts or conversations, repeated for the samples of a group.
            trainer: The `GRPOTrainer` that calls.
            environment: Function that is called after each turn of the policy, in the order of the prompts.
                It returns a text, token ids or chat messages as its answer, or None to end the conversation.
                Its answer to the last turn is ignored.
            turns: Maximum number of the policy's turns, at least 1.
            turn_tokens: Maximum number of tokens of one turn, at least 1; None limits a turn only by
                ``max_completion_length``.

        Returns:
            The columns ``prompt_ids``, ``completion_ids``, ``logprobs`` and ``env_mask`` with one list for
            each prompt, and a column for each key that the environment has written to
            `Conversation.columns`, with None for conversations without the key.

        Raises:
            UserError: If ``turns`` or ``turn_tokens`` is not a count, an answer has another type, or a reward
                function reads entropies.
        """
        for name, count in {"turns": turns, "turn_tokens": 1 if turn_tokens is None else turn_tokens}.items():
            if isinstance(count, bool) or not isinstance(count, int) or count < 1:
                raise UserError(f"paceline: {name} is {count!r}: write an integer of at least 1")
        if any(getattr(f, "needs_entropies", False) for f in trainer.reward_funcs):
            raise UserError(
                "paceline: rewards that read entropies support one turn only: use another reward with "
                "converse()"
            )
        conversations = [
            Conversation(p, list(ids))
            for p, ids in zip(prompts, self._tokenized(prompts, trainer), strict=True)
        ]
        try:
            self._take_turns(conversations, trainer, environment, turns, turn_tokens)
        finally:
            if self._hosted is not None:
                self._hosted.engine.kept.clear()
        extra = {name: None for conversation in conversations for name in conversation.columns}
        columns = {
            name: [getattr(conversation, name) for conversation in conversations]
            for name in ("prompt_ids", "completion_ids", "logprobs", "env_mask")
        }
        return {**{name: [c.columns.get(name) for c in conversations] for name in extra}, **columns}

    def _take_turns(
        self,
        conversations: list[Conversation],
        trainer: Any,
        environment: Environment,
        turns: int,
        turn_tokens: int | None,
    ) -> None:
        """Plays until all conversations are finished or have had all their turns. Collective."""
        limit = trainer.max_completion_length
        for turn in range(turns):
            active = [conversation for conversation in conversations if not conversation.finished]
            if not any_rank(trainer.accelerator, bool(active)):
                break
            longest = limit if turn_tokens is None else turn_tokens
            max_tokens = [min(longest, limit - len(c.completion_ids)) for c in active]
            rollouts = self.complete([c.token_ids for c in active], trainer, max_tokens=max_tokens, keep=True)
            for conversation, rollout in zip(active, rollouts, strict=True):
                self._take_turn(conversation, rollout, trainer, environment, last=turn + 1 == turns)

    def _take_turn(
        self, conversation: Conversation, rollout: Rollout, trainer: Any, environment: Environment, last: bool
    ) -> None:
        """Appends a turn and the environment's answer, unless this was the conversation's last turn."""
        tokenizer = _tokenizer_of(trainer)
        conversation.add_turn(rollout, tokenizer)
        answer = environment(conversation)
        conversation.finished = True
        if answer is None or last:
            return
        ids = answer_ids(tokenizer, answer, rollout.token_ids[-1], trainer.chat_template_kwargs)
        if len(conversation.completion_ids) + len(ids) < trainer.max_completion_length:
            conversation.add_answer(ids)
            conversation.finished = False

    def complete(
        self,
        prompt_ids: Sequence[Sequence[int]],
        trainer: Any,
        *,
        max_tokens: Sequence[int] | None = None,
        keep: bool = False,
    ) -> list[Rollout]:
        """Generates a rollout for each prompt of token ids, in order.

        Collective: every rank must call it equally often, with an empty list if it has no prompts.

        Args:
            prompt_ids: Token ids of this rank's prompts.
            trainer: The trainer that calls.
            max_tokens: Maximum number of tokens of each completion; None for the trainer's
                ``max_completion_length``.
            keep: Whether to cache keys and values of these rollouts for later calls whose prompts share a
                prefix with them, until the weights change. This may take as much memory again as the engine's
                cache.
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
        """Creates the requests of a call.

        A request's seed depends on the trainer's seed, the call, the rank, the prompt, and the sample's
        number among those of its prompt.
        """
        assert self._hosted is not None
        params = replace(self._hosted.worker.params, **_sampling(trainer))
        limits = [params.max_tokens] * len(prompt_ids) if max_tokens is None else max_tokens
        call, rank, samples = self._call_name(trainer), trainer.accelerator.process_index, Counter[str]()
        requests = []
        for ids, limit in zip(prompt_ids, limits, strict=True):
            key = hashlib.blake2b(repr(list(ids)).encode(), digest_size=12).hexdigest()
            seed = stable_seed(trainer.args.seed, 0, f"{call}/{rank}/{key}", samples[key])
            requests.append(Request(list(ids), replace(params, max_tokens=limit), seed, group=key))
            samples[key] += 1
        return requests

    def _call_name(self, trainer: Any) -> str:
        """Returns a name for this call, from the trainer's step and the number of earlier calls in it.

        Evaluations are counted separately, so that a run that resumes after one uses the seeds that it would
        have used without the interruption.
        """
        mode, step = "" if trainer.model.training else "/evaluation", int(trainer.state.global_step)
        previous = self._calls.get(mode)
        calls = previous[1] + 1 if previous is not None and previous[0] == step else 0
        self._calls[mode] = step, calls
        return f"{step}/{calls}{mode}"

    def _host(self, trainer: Any) -> HostedRollouts:
        """Returns the engine on the trainer's current policy, and builds it if necessary."""
        model = trainer.accelerator.unwrap_model(trainer.model)
        same_trainer = self._trainer is not None and self._trainer() is trainer
        if self._hosted is not None and same_trainer and self._hosted.policy.reads(model):
            return self._hosted
        previous = self._hosted if same_trainer else None
        self._hosted, self._trainer = self._start(trainer, model), weakref.ref(trainer)
        if previous is not None:
            _LOG.warning("the policy's modules were replaced: building a new engine, which keeps the drafter")
            self._hosted.take_over(previous)
        elif trainer.state.global_step:
            self._resume(trainer)
        if self not in trainer.callback_handler.callbacks:
            trainer.add_callback(self)
        return self._hosted

    def _start(self, trainer: Any, model: torch.nn.Module) -> HostedRollouts:
        check_trainer(trainer, model)
        args, accelerator = trainer.args, trainer.accelerator
        longest = trainer.max_completion_length
        max_positions = (
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
                "max_context": min(longest + _ROOM_FOR_PROMPTS, max_positions),
                "dtype": "bfloat16" if args.bf16 else "float32",
            },
        }
        config = host_config(self._sections, from_host, alone=accelerator.num_processes == 1)
        if config.rollout.max_context > max_positions:
            raise UserError(
                f"paceline: rollout.max_context is {config.rollout.max_context}: the policy reads "
                f"{max_positions} tokens at most; write a number up to that"
            )
        policy = HostPolicy(model, getattr(torch, config.rollout.dtype), accelerator.device)
        hosted = HostedRollouts(config, policy, _tokenizer_of(trainer), accelerator, _LOG.warning)
        self._entropies = any(getattr(f, "needs_entropies", False) for f in trainer.reward_funcs)
        hosted.engine.collect_entropies = self._entropies
        return hosted

    def _resume(self, trainer: Any) -> None:
        assert self._hosted is not None
        resumed_from = trainer.args.resume_from_checkpoint
        checkpoints = [Path(resumed_from)] if isinstance(resumed_from, str) else []
        checkpoints.append(Path(trainer.args.output_dir) / f"checkpoint-{trainer.state.global_step}")
        folder = next((p / _FOLDER for p in checkpoints if (p / _FOLDER / "state.json").is_file()), None)
        if folder is None:
            _LOG.warning(f"{checkpoints[-1]} holds no paceline drafter: starting with a new one")
        else:
            self._hosted.load(folder)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Saves the drafter to the checkpoint that the trainer has just written."""
        if self._hosted is not None and state.is_world_process_zero:
            self._hosted.save(Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / _FOLDER)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Exports the drafter."""
        if self._hosted is not None:
            self._hosted.finish()


class RLOOTrainer(trl.RLOOTrainer):
    """Adds the argument ``rollout_func`` to TRL's `RLOOTrainer`.

    Args:
        args: Positional arguments of TRL's trainer.
        rollout_func: Result of `paceline_rollouts`; None generates with TRL.
        kwargs: Keyword arguments of TRL's trainer.
    """

    def __init__(self, *args: Any, rollout_func: PacelineRollouts | None = None, **kwargs: Any) -> None:
        self.rollout_func = rollout_func
        super().__init__(*args, **kwargs)

    def _generate_single_turn(self, prompt_ids: Any, images: Any, multimodal_fields: Any) -> list[list[int]]:
        if self.rollout_func is None:
            completions: list[list[int]] = super()._generate_single_turn(
                prompt_ids, images, multimodal_fields
            )
            return completions
        if images is not None:
            raise UserError(_TEXT_ONLY)
        return [r.token_ids for r in self.rollout_func.complete(prompt_ids, self)]


def _tokenizer_of(trainer: Any) -> Any:
    return getattr(trainer.processing_class, "tokenizer", trainer.processing_class)


def _sampling(trainer: Any) -> dict[str, Any]:
    """Returns the trainer's current sampling settings under the names of `SamplingParams` and ``rollout``."""
    return {
        "temperature": float(trainer.temperature),
        "top_k": max(trainer.top_k or 0, 0),
        "top_p": float(trainer.top_p),
        "max_tokens": trainer.max_completion_length,
    }
