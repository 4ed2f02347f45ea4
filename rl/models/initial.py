"""Loads the policy and the drafter that a run starts or resumes from, and copies weights between policies."""

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
    """Returns the directory of the policy that a run starts from, downloading it if necessary.

    Raises:
        UserError: If the recipe asks for a warm-up that has not been run yet.
    """
    if config.policy.warmup is None:
        return fetch_policy(config.policy.model)
    path = warmed_policy_path(config)
    if not path.is_dir():
        raise UserError(
            "policy.warmup: the warmed-up policy does not exist yet; first run paceline warmup with this "
            "recipe and the same overrides"
        )
    return path


def warmed_policy_path(config: RunConfig) -> Path:
    """Returns the cache path of a recipe's warmed-up policy, which is keyed by every setting that shapes it.

    Args:
        config: Recipe with a ``policy.warmup``.
    """
    assert config.policy.warmup is not None
    datasets = [{"name": d.name, "weight": d.weight, "params": d.params} for d in config.task.datasets]
    settings = asdict(config.policy.warmup)
    if not settings["rechecks"]:
        del settings["rechecks"]  # keeps the digest of policies cached before this key existed
    parts: list[object] = [config.policy.model, settings, datasets]
    parts += [config.task.instruction, config.task.system]
    parts += [config.task.chat_template_kwargs] if config.task.chat_template_kwargs else []
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:12]
    return cache_dir() / "warmed" / f"{config.policy.model.replace('/', '--')}-{digest}"


def trained_policy(
    config: RunConfig, source: Path, device: torch.device, checkpoint: Path | None
) -> PreTrainedModel:
    """Loads the policy to train, in float32, with the recipe's adapters.

    Args:
        config: Recipe of the run.
        source: Directory of the policy that the run starts from.
        device: Device to load the policy to.
        checkpoint: Directory of the checkpoint to resume from; None at the start of a run.
    """
    if config.scale.lora is None:
        return load_policy(_full_weights(source, checkpoint), device)
    policy = load_policy(source, device)
    add_adapters(policy, config.scale.lora, config.seed, adapter_base(config.policy.model, source))
    if checkpoint is not None:
        load_adapters(policy, checkpoint / "adapter")
    return policy


def tap_layers(drafter: DrafterConfig, policy: PreTrainedConfig) -> tuple[int, ...]:
    """Returns the three decoder layers whose inputs the EAGLE-3 drafter reads.

    Raises:
        UserError: If ``drafter.tap_layers`` names layers that the policy does not have.
    """
    layers = policy.get_text_config().num_hidden_layers
    chosen = drafter.tap_layers or default_tap_layers(layers)
    if len(chosen) != 3 or list(chosen) != sorted(chosen) or not 0 <= chosen[0] <= chosen[-1] < layers:
        raise UserError(
            f"drafter.tap_layers is {list(chosen)}: write three layers from 0 to {layers - 1} in ascending "
            "order, or [] for the default"
        )
    return chosen


def starting_drafter(config: RunConfig, policy: PreTrainedConfig) -> Eagle3Model | None:
    """Loads the drafter at ``drafter.start`` in float32.

    Returns:
        The drafter; None if ``drafter.start`` is null or ``speculation.drafters`` has no eagle3.

    Raises:
        UserError: If the drafter does not fit the policy and the recipe.
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
    """Returns the base model that a run's adapters belong to.

    This is the hub's id and commit if the policy is an unmodified hub model, else its directory.

    Args:
        model: Value of ``policy.model``.
        source: Directory of the policy that the run starts from.
    """
    parent = source.parent
    if Path(model).is_dir() or parent.name != "snapshots" or cache_dir() in source.parents:
        return AdapterBase(str(source.absolute()))
    return AdapterBase(model, source.name)


def decoding_copy(
    config: RunConfig, source: Path, device: torch.device, checkpoint: Path | None
) -> PreTrainedModel:
    """Loads a separate, unsharded policy for the engine, in ``rollout.dtype`` and without gradients.

    The engine needs it if the trained weights are sharded or have adapters beside them.

    Args:
        config: Recipe of the run.
        source: Directory of the policy that the run starts from.
        device: Device to load the policy to.
        checkpoint: Directory of the checkpoint to resume from; None at the start of a run.
    """
    return load_policy(
        _full_weights(source, checkpoint), device, getattr(torch, config.rollout.dtype)
    ).requires_grad_(False)


def _full_weights(source: Path, checkpoint: Path | None) -> Path:
    return source if checkpoint is None else checkpoint / "policy"


@torch.no_grad()
def copy_weights(weights: Iterator[tuple[str, torch.Tensor]], target: PreTrainedModel) -> None:
    """Copies full weights into a policy's parameters of the same names. Collective if the iterator is.

    Args:
        weights: Pairs of parameter name and full tensor.
        target: Policy whose parameters are overwritten.

    Raises:
        ValueError: If a name or shape does not match; the weights before it have been copied by then.
    """
    # remove_duplicate=False: a tied weight may come under any of its names
    parameters = dict(target.named_parameters(remove_duplicate=False))
    for name, tensor in weights:
        if name not in parameters:
            raise ValueError(
                f"weights contain {name!r}, which the policy does not have: send the weights of the policy "
                "that was loaded"
            )
        if parameters[name].shape != tensor.shape:
            raise ValueError(
                f"weights: {name!r} has shape {list(tensor.shape)}, and the policy's has "
                f"{list(parameters[name].shape)}: send the weights of the policy that was loaded"
            )
        parameters[name].copy_(tensor)
