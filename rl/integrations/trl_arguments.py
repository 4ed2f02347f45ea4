"""Rejects arguments of TRL's trainers that the engine does not support, in one line, before it is built."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
import trl
from torch import nn

from paceline.rl.errors import UserError
from paceline.rl.rewards.registry import LengthAware
from paceline.rl.sharding.gathering import is_partitioned
from paceline.rollout import SamplingParams

_LEAVE_OUT = "leave it out"
_NEUTRAL_VALUES: dict[str, Any] = {  # generation_kwargs that change nothing
    "do_sample": True,
    "use_cache": True,
    "num_beams": 1,
    "num_return_sequences": 1,
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_p": 0.0,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
}
_WRITTEN_ELSEWHERE = {
    "temperature": "write it as the argument temperature",
    "top_k": "write it as the argument top_k",
    "top_p": "write it as the argument top_p",
    "max_new_tokens": "write it as the argument max_completion_length",
    "max_length": "write max_completion_length, the longest completion without its prompt",
    "eos_token_id": "write it into the model's generation_config",
    "stop_strings": 'write paceline_rollouts(rollout={"stop_strings": [...]})',
}
_USE_CONVERSE = "leave it out; write a rollout function that calls converse(): docs/multi_turn.md"


def check_arguments(args: Any) -> None:
    """Checks a trainer's arguments on their own.

    Args:
        args: TRL's `GRPOConfig` or `RLOOConfig`.

    Raises:
        UserError: If there are arguments that the rollouts would not honour; the message lists all of them
            with what to write instead.
    """
    if not isinstance(args, trl.GRPOConfig | trl.RLOOConfig):
        raise UserError(
            f"paceline: args is a {type(args).__name__}: pass the trainer's GRPOConfig or RLOOConfig"
        )
    _raise_if_any([*_generation(args), *_generation_kwargs(args), *_vllm(args), *_sampling(args)])


def check_trainer(trainer: Any, model: nn.Module) -> None:
    """Checks a trainer as a whole: its arguments, tools, rewards, and the devices of its policy.

    Args:
        trainer: TRL's `GRPOTrainer` or `RLOOTrainer`, or a subclass.
        model: The trainer's unwrapped policy.

    Raises:
        UserError: If there is something that the rollouts would not honour; the message lists all of it.
    """
    if not isinstance(trainer, trl.GRPOTrainer | trl.RLOOTrainer):
        raise UserError(
            f"paceline: the trainer is a {type(trainer).__name__}: use TRL's GRPOTrainer, or the RLOOTrainer "
            "of paceline.rl.integrations.trl"
        )
    check_arguments(trainer.args)
    _raise_if_any([*_tools(trainer), *_rewards(trainer), *_devices(model)])


def _raise_if_any(problems: list[str]) -> None:
    if problems:
        raise UserError(f"paceline: {'; '.join(problems)}")


def _generation(args: Any) -> list[str]:
    checks = {
        "use_vllm": (bool(args.use_vllm), "write use_vllm=False: Paceline's engine makes the rollouts"),
        "use_transformers_continuous_batching": (
            bool(getattr(args, "use_transformers_continuous_batching", False)),
            "leave it out: the engine batches continuously by itself",
        ),
        "cache_implementation": (
            args.cache_implementation is not None,
            "leave it out: the engine has its own cache",
        ),
        "min_p": (bool(args.min_p), "write top_p or top_k: the engine does not sample by min_p"),
        "repetition_penalty": (
            args.repetition_penalty not in (None, 1.0),
            "write 1.0: rollouts are sampled from the policy's own distribution, without penalties",
        ),
        "max_completion_length": (
            args.max_completion_length is None,
            "write the longest completion in tokens",
        ),
    }
    return [f"{name} is {getattr(args, name)}: {fix}" for name, (wrong, fix) in checks.items() if wrong]


def _generation_kwargs(args: Any) -> list[str]:
    kwargs = args.generation_kwargs or {}
    if not isinstance(kwargs, Mapping):
        return [f"generation_kwargs is a {type(kwargs).__name__}: write a dictionary"]
    wrong = {
        name: value
        for name, value in kwargs.items()
        if value is not None and _NEUTRAL_VALUES.get(name, _LEAVE_OUT) != value
    }
    return [
        f"generation_kwargs.{name} is {value}: {_WRITTEN_ELSEWHERE.get(name, _LEAVE_OUT)}"
        for name, value in wrong.items()
    ]


def _vllm(args: Any) -> list[str]:
    """Returns problems with ``vllm_*`` arguments, which TRL reads only if vLLM samples.

    Among them is the importance sampling correction for the training–inference mismatch.
    """
    if args.use_vllm:
        return []
    changed = [
        f.name
        for f in dataclasses.fields(args)
        if f.name.startswith("vllm_")
        and f.default is not dataclasses.MISSING
        and getattr(args, f.name) != f.default
    ]
    return [
        f"{name} is {getattr(args, name)}: leave it out, TRL reads it only with use_vllm" for name in changed
    ]


def _sampling(args: Any) -> list[str]:
    try:
        SamplingParams(args.temperature, max(args.top_k or 0, 0), args.top_p)
    except (TypeError, ValueError) as error:
        return [" ".join(str(error).split())]
    return (
        ["temperature is 0: write a number above 0, TRL divides logits by it"]
        if args.temperature == 0
        else []
    )


def _tools(trainer: Any) -> list[str]:
    arguments = {
        "environment_factory": getattr(trainer, "environment_factories", None),
        "tools": getattr(trainer, "tools", None),
    }
    given = [name for name, value in arguments.items() if value]
    # only the first: an environment's methods are tools as well
    return [f"{given[0]} is given: {_USE_CONVERSE}"] if given else []


def _rewards(trainer: Any) -> list[str]:
    problems = []
    samples = {"num_generations": trainer.num_generations}
    if trainer.args.eval_strategy != "no":
        samples["num_generations_eval"] = trainer.num_generations_eval
    for reward in trainer.reward_funcs:
        if not isinstance(reward, LengthAware):
            continue
        problems += [
            f"LengthAware(group_size={reward.group_size}) but {name}={count}: write the same number"
            for name, count in samples.items()
            if count != reward.group_size
        ]
        if reward.longest != trainer.max_completion_length:
            problems.append(
                f"LengthAware(longest={reward.longest}) but "
                f"max_completion_length={trainer.max_completion_length}: write the same number"
            )
    return problems


def _devices(model: nn.Module) -> list[str]:
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) < 2 or is_partitioned(model):
        return []
    if str(torch.device("meta")) in devices:
        return [
            'a part of the policy is offloaded to a disk: write model_init_kwargs={"device_map": None} to '
            "load all of it"
        ]
    where = ", ".join(devices)
    return [
        f'the policy is on several devices ({where}): write model_init_kwargs={{"device_map": None}} '
        "and start a process for each device"
    ]
