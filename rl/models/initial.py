"""What a run starts from, or where one goes on: the policy, as it is trained and as the engine decodes it,
and a first drafter.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from paceline.drafter_trainer.errors import DrafterError
from paceline.drafter_trainer.storage.checkpoint import load_drafter
from paceline.rl.config.drafter import DrafterConfig
from paceline.rl.config.run import RunConfig
from paceline.rl.errors import UserError
from paceline.rl.models.loading import load_policy
from paceline.rl.models.lora import AdapterBase, add_adapters, load_adapters
from paceline.rl.models.policies import cache_dir, fetch_policy
from paceline.rollout import default_tap_layers
from paceline.rollout.drafters.eagle3_model import Eagle3Model


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
            "policy.warmup: the warmed-up policy is not there yet; run paceline warmup with this recipe and "
            "overrides first"
        )
    return path


def warmed_policy_path(config: RunConfig) -> Path:
    """Where the warmed-up policy of a recipe is cached: a function of all that shapes it."""
    assert config.policy.warmup is not None
    datasets = [{"name": d.name, "weight": d.weight, "params": d.params} for d in config.task.datasets]
    settings = asdict(config.policy.warmup)
    if not settings["rechecks"]:
        del settings["rechecks"]  # so that what was cached before there was such a key is found
    parts: list[object] = [config.policy.model, settings, datasets]
    parts += [config.task.instruction, config.task.system]
    parts += [config.task.chat_template_kwargs] if config.task.chat_template_kwargs else []
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
    return cache_dir() / "warmed" / f"{config.policy.model.replace('/', '--')}-{digest}"


def trained_policy(
    config: RunConfig, source: Path, device: torch.device, checkpoint: Path | None
) -> PreTrainedModel:
    """Loads the policy in float32, from the start or from a checkpoint's directory, with the recipe's
    adapters.
    """
    if config.scale.lora is None:
        return load_policy(_whole_weights(source, checkpoint), device)
    policy = load_policy(source, device)
    add_adapters(policy, config.scale.lora, config.seed, adapter_base(config.policy.model, source))
    if checkpoint is not None:
        load_adapters(policy, checkpoint / "adapter")
    return policy


def tap_layers(drafter: DrafterConfig, policy: PreTrainedConfig) -> tuple[int, ...]:
    """The layers whose inputs the EAGLE-3 drafter reads.

    Raises:
        UserError: for ``drafter.tap_layers`` that the policy does not have.
    """
    layers = policy.get_text_config().num_hidden_layers
    chosen = drafter.tap_layers or default_tap_layers(layers)
    if len(chosen) != 3 or list(chosen) != sorted(chosen) or not 0 <= chosen[0] <= chosen[-1] < layers:
        raise UserError(
            f"drafter.tap_layers is {list(chosen)}: write three layers from 0 to {layers - 1}, in order, or "
            "[]"
        )
    return chosen


def starting_drafter(config: RunConfig, policy: PreTrainedConfig) -> Eagle3Model | None:
    """The drafter in ``drafter.start``, float32; None where none is named, or none is wanted.

    Raises:
        UserError: where it cannot be used with the policy and the recipe.
    """
    d, text = config.drafter, policy.get_text_config()
    if d.start is None or "eagle3" not in config.speculation.drafters:
        return None
    taps = tap_layers(d, policy)
    try:
        return load_drafter(
            Path(d.start),
            text.vocab_size,
            text.hidden_size,
            tap_layers=taps,
            draft_vocab_size=d.draft_vocab_size,
        )
    except DrafterError as error:
        raise UserError(f"drafter.start: {error}") from None


def adapter_base(model: str, source: Path) -> AdapterBase:
    """What adapters of a run belong to: the hub's id and commit where the policy is the hub's own, else its
    directory.

    Args:
        model: ``policy.model``.
        source: Where the policy that the run starts from lies.
    """
    cached = source.parent
    if Path(model).is_dir() or cached.name != "snapshots" or cache_dir() in source.parents:
        return AdapterBase(str(source.absolute()))
    return AdapterBase(model, source.name)


def decoding_copy(
    config: RunConfig, source: Path, device: torch.device, checkpoint: Path | None
) -> PreTrainedModel:
    """Whole and in the engine's precision, for where what is trained lies in parts or beside adapters."""
    return load_policy(
        _whole_weights(source, checkpoint), device, getattr(torch, config.rollout.dtype)
    ).requires_grad_(False)


def _whole_weights(source: Path, checkpoint: Path | None) -> Path:
    return source if checkpoint is None else checkpoint / "policy"


@torch.no_grad()
def copy_weights(weights: Iterator[tuple[str, torch.Tensor]], target: PreTrainedModel) -> None:
    """Puts whole weights into a module that has parameters of the same names. Collective where the iterator
    is.

    Raises:
        ValueError: for a name that the module does not have, or another shape; weights before it are replaced
            by then.
    """
    # a tied weight goes by each of its names
    parameters = dict(target.named_parameters(remove_duplicate=False))
    for name, tensor in weights:
        if name not in parameters:
            raise ValueError(
                f"weights have {name!r}, which the policy does not: send those of the policy that was loaded"
            )
        if parameters[name].shape != tensor.shape:
            shapes = f"{list(tensor.shape)}, and of the policy's {list(parameters[name].shape)}"
            raise ValueError(
                f"weights {name!r} are of shape {shapes}: send those of the policy that was loaded"
            )
        parameters[name].copy_(tensor)
