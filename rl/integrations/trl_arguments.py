"""What TRL's trainers can be asked for and the engine does not do: found before anything is built, and said
in one line.
"""

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
_NEUTRAL: dict[str, Any] = {
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
_OWN_LOOP = "leave it out; a rollout function of your own plays turns with an environment: docs/multi_turn.md"


def check_arguments(args: Any) -> None:
    """Looks at a trainer's arguments alone.

    Args:
        args: TRL's `GRPOConfig` or `RLOOConfig`.

    Raises:
        UserError: one line with everything that the rollouts would not follow, and what to write instead.
    """
    if not isinstance(args, trl.GRPOConfig | trl.RLOOConfig):
        raise UserError(
            f"paceline: args is a {type(args).__name__}: give the trainer's GRPOConfig or RLOOConfig"
        )
    _refuse([*_generation(args), *_generation_kwargs(args), *_vllm(args), *_sampling(args)])


def check_trainer(trainer: Any, model: nn.Module) -> None:
    """Looks at a trainer as a whole: its arguments, tools, rewards, and where its policy lies.

    Args:
        trainer: TRL's `GRPOTrainer` or `RLOOTrainer`, or a subclass.
        model: Its unwrapped policy.

    Raises:
        UserError: as `check_arguments`.
    """
    if not isinstance(trainer, trl.GRPOTrainer | trl.RLOOTrainer):
        raise UserError(
            "paceline: rollouts are for TRL's GRPOTrainer and RLOOTrainer, this is a "
            f"{type(trainer).__name__}"
        )
    check_arguments(trainer.args)
    _refuse([*_tools(trainer), *_rewards(trainer), *_devices(model)])


def _refuse(problems: list[str]) -> None:
    if problems:
        raise UserError(f"paceline: {'; '.join(problems)}")


def _generation(args: Any) -> list[str]:
    asked = {
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
            "write 1.0: rollouts are of the policy's own distribution, without penalties",
        ),
        "max_completion_length": (
            args.max_completion_length is None,
            "write the longest completion in tokens",
        ),
    }
    return [f"{name} is {getattr(args, name)}: {what}" for name, (wrong, what) in asked.items() if wrong]


def _generation_kwargs(args: Any) -> list[str]:
    given = args.generation_kwargs or {}
    if not isinstance(given, Mapping):
        return [f"generation_kwargs is a {type(given).__name__}: write a dictionary"]
    wrong = {
        name: value
        for name, value in given.items()
        if value is not None and _NEUTRAL.get(name, _LEAVE_OUT) != value
    }
    return [
        f"generation_kwargs.{name} is {value}: {_WRITTEN_ELSEWHERE.get(name, _LEAVE_OUT)}"
        for name, value in wrong.items()
    ]


def _vllm(args: Any) -> list[str]:
    """What only vLLM's rollouts read; TRL corrects for sampling by others only where vLLM samples."""
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
        f"{name} is {getattr(args, name)}: leave it out, TRL reads it with use_vllm only" for name in changed
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
    asked = {
        "environment_factory": getattr(trainer, "environment_factories", None),
        "tools": getattr(trainer, "tools", None),
    }
    given = [name for name, value in asked.items() if value]
    return [f"{given[0]} is given: {_OWN_LOOP}"] if given else []  # an environment's methods are tools, too


def _rewards(trainer: Any) -> list[str]:
    problems = []
    samples = {"num_generations": trainer.num_generations}
    if trainer.args.eval_strategy != "no":
        samples["num_generations_eval"] = trainer.num_generations_eval
    for reward in trainer.reward_funcs:
        if not isinstance(reward, LengthAware):
            continue
        problems += [
            f"LengthAware(group_size={reward.group_size}) compares other groups than {name}={count}: write "
            "the same number"
            for name, count in samples.items()
            if count != reward.group_size
        ]
        if reward.longest != trainer.max_completion_length:
            problems.append(
                f"LengthAware(longest={reward.longest}) but "
                f"max_completion_length={trainer.max_completion_length}: write one"
            )
    return problems


def _devices(model: nn.Module) -> list[str]:
    devices = sorted({str(p.device) for p in model.parameters()})
    if len(devices) < 2 or is_partitioned(model):
        return []
    if str(torch.device("meta")) in devices:
        return ['the policy lies on a disk in part: load it whole, model_init_kwargs={"device_map": None}']
    where = ", ".join(devices)
    return [
        f'the policy is on several devices ({where}): write model_init_kwargs={{"device_map": None}} '
        "and start a process for each"
    ]
