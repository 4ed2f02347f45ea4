"""Low-rank adapters through peft: put into the policy, merged for the engine, kept in peft's own format."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from rl.errors import UserError
from rl.sections import LoraConfig

_BASE = ".base_layer."
_THEIRS = "base_model.model."  # what peft puts before each name


def add_adapters(policy: PreTrainedModel, lora: LoraConfig, seed: int) -> None:
    """Puts adapters that start at zero into the policy and leaves nothing else trainable; equal on every rank for one seed.

    Raises:
        UserError: when peft is not installed, or no layer has one of the names.
    """
    try:
        from peft import LoraConfig as Adapters
        from peft import inject_adapter_in_model
    except ImportError:
        raise UserError("scale.lora needs peft: pip install 'paceline[lora]'") from None
    wanted = list(lora.targets) or _linear_names(policy)
    config = Adapters(r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=wanted)
    try:
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            inject_adapter_in_model(config, policy)
    except ValueError as error:
        raise UserError(f"scale.lora.targets: {' '.join(str(error).split())[:160]}") from None


def _linear_names(policy: PreTrainedModel) -> list[str]:
    named = policy.base_model.named_modules()
    return sorted({name.rpartition(".")[2] for name, module in named if isinstance(module, torch.nn.Linear)})


def merged(
    full_weights: Callable[[Callable[[str], bool]], Iterator[tuple[str, torch.Tensor]]], scaling: float | None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole weights under the names that they have without adapters, W + scaling · B A where there is one (equation 3 of
    arXiv 2106.09685).

    Args:
        full_weights: `rl.sharding.Trained.full_weights`, or the like.
        scaling: Of adapters named ``default``; None where there are none.
    """
    if scaling is None:
        yield from full_weights(lambda name: True)
        return
    factors = dict(full_weights(lambda name: ".lora_" in name))
    for name, tensor in full_weights(lambda name: ".lora_" not in name):
        layer, found, rest = name.partition(_BASE)
        if found and rest == "weight":
            down, up = (factors[f"{layer}.lora_{side}.default.weight"].float() for side in "AB")
            tensor = tensor + scaling * (up @ down)
        yield f"{layer}.{rest}" if found else name, tensor


def save_adapters(policy: PreTrainedModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes peft's ``adapter_config.json`` and ``adapter_model.safetensors``; OSError and SafetensorError as they come.

    Args:
        policy: With adapters.
        weights: Whole, on the CPU, by their names in the policy.
        folder: Is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = policy.peft_config
    config["default"].save_pretrained(str(folder))
    save_file(
        {_THEIRS + n.replace(".default.", "."): t.contiguous() for n, t in weights.items()}, folder / "adapter_model.safetensors"
    )


@contextmanager
def without_adapters(policy: PreTrainedModel) -> Iterator[None]:
    """The policy as it was before it had any."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in policy.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


@torch.no_grad()
def load_adapters(policy: PreTrainedModel, path: Path) -> None:
    """Reads ``adapter_model.safetensors`` into adapters that are there.

    Raises:
        UserError: truncated, missing, or of other layers.
    """
    try:
        tensors = load_file(path / "adapter_model.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or missing ({error}); resume from another checkpoint") from None
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            found = tensors.get(_THEIRS + name.replace(".default.", "."))
            if found is None or found.shape != parameter.shape:
                raise UserError(f"{path}: has no adapter for {name}, or of another rank; resume with the recipe of the run")
            parameter.copy_(found)
