"""Low-rank adapters through peft: put into the policy, merged for the engine, kept in peft's own format."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from paceline.rl.config.scale import LoraConfig
from paceline.rl.errors import UserError, one_line
from paceline.rl.models.mergeable import AdaptedLayer, adapted_layers

_BASE = ".base_layer."
_THEIRS = "base_model.model."  # what peft puts before each name


@dataclass(frozen=True, slots=True)
class AdapterBase:
    """What adapters are for, as their directory says it: a hub id or a directory, and the hub's commit where
    there is one.
    """

    name: str
    revision: str | None = None


def add_adapters(
    policy: PreTrainedModel, lora: LoraConfig, seed: int, base: AdapterBase | None = None
) -> None:
    """Puts adapters that start at zero into the policy and leaves nothing else trainable; equal on every rank
    for one seed.

    Args:
        policy: Is changed.
        lora: The recipe's.
        seed: Of A; B is zero.
        base: Goes into the config of saved adapters, from which peft finds the weights they belong to.

    Raises:
        UserError: when peft is not installed, a name leads to no layer, or to one whose adapter does not
            merge exactly.
    """
    try:
        from peft import LoraConfig as Adapters
        from peft import inject_adapter_in_model
    except ImportError:
        raise UserError("scale.lora needs peft: pip install 'paceline[lora]'") from None
    wanted = list(lora.targets) or _linear_names(policy)
    _check_names(policy, wanted)
    config = Adapters(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=wanted, task_type="CAUSAL_LM"
    )
    if base is not None:
        config.base_model_name_or_path, config.revision = base.name, base.revision
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            # peft says that it sets fan_in_fan_out for GPT-2's layers, and that lm_head is tied, which is
            # refused below
            warnings.simplefilter("ignore", UserWarning)
            torch.manual_seed(seed)
            inject_adapter_in_model(config, policy)
        adapted_layers(policy)
    except (ValueError, TypeError) as error:
        raise UserError(f"scale.lora.targets: {one_line(error, 240)}") from None


def _linear_names(policy: PreTrainedModel) -> list[str]:
    named = policy.base_model.named_modules()
    return sorted(
        {name.rpartition(".")[2] for name, module in named if isinstance(module, torch.nn.Linear | Conv1D)}
    )


def _check_names(policy: PreTrainedModel, wanted: list[str]) -> None:
    names = [name for name, _ in policy.named_modules()]
    for target in wanted:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = ", ".join(_linear_names(policy))
            raise UserError(
                f"scale.lora.targets: no layer is named {target!r}; write some of {known}, or [] for all"
            )


def merged_weights(
    full_weights: Callable[[Callable[[str], bool]], Iterator[tuple[str, torch.Tensor]]],
    layers: Mapping[str, AdaptedLayer] | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Whole weights under the names that they have without adapters, W + scaling · B A where there is one
    (equation 3 of arXiv 2106.09685).

    Args:
        full_weights: `paceline.rl.sharding.Trained.full_weights`, or the like.
        layers: From `adapted_layers`, by the names that ``full_weights`` uses; None where there are no
            adapters.
    """
    if layers is None:
        yield from full_weights(lambda name: True)
        return
    factors = dict(full_weights(lambda name: ".lora_" in name))
    for name, tensor in full_weights(lambda name: ".lora_" not in name):
        layer, found, rest = name.partition(_BASE)
        if rest == "weight" and layer in layers:
            adapted = layers[layer]
            down, up = (factors[f"{layer}.lora_{side}.{adapted.adapter}.weight"] for side in "AB")
            tensor = tensor + adapted.delta(down, up).to(tensor.device)
        yield f"{layer}.{rest}" if found else name, tensor


def save_adapters(policy: PreTrainedModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes peft's ``adapter_config.json`` and ``adapter_model.safetensors``; OSError and SafetensorError as
    they come.

    Args:
        policy: With adapters.
        weights: Whole, on the CPU, by their names in the policy.
        folder: Is made.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = policy.peft_config
    config["default"].save_pretrained(str(folder))
    tensors = {_THEIRS + n.replace(".default.", "."): t.contiguous() for n, t in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@contextmanager
def without_adapters(policy: PreTrainedModel) -> Iterator[None]:
    """Turns the policy's adapters off inside the block, where it is the policy that they were put into."""
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
        UserError: truncated, missing, of other layers, or not finite.
    """
    try:
        tensors = load_file(path / "adapter_model.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: truncated or missing ({error}); resume from another checkpoint") from None
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            found = tensors.get(_THEIRS + name.replace(".default.", "."))
            if found is None or found.shape != parameter.shape:
                raise UserError(
                    f"{path}: has no adapter for {name}, or of another rank; resume with the recipe of the "
                    "run"
                )
            if not found.is_floating_point() or not bool(found.isfinite().all()):
                raise UserError(
                    f"{path}: the adapter for {name} is not of finite numbers; resume from another checkpoint"
                )
            parameter.copy_(found)


def reject_adapter_directory(folder: Path) -> None:
    """Says what to do with a directory that holds adapters and not the policy that they belong to.

    Raises:
        UserError: where it is one.
    """
    described = folder / "adapter_config.json"
    if not described.is_file() or (folder / "config.json").is_file():
        return
    try:
        base = json.loads(described.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    loaded = f"AutoPeftModelForCausalLM.from_pretrained({str(folder)!r})"
    merge = f"{loaded}.merge_and_unload().save_pretrained('MERGED')"
    raise UserError(
        f"policy.model {folder}: holds adapters of {base or 'an unnamed policy'}, not a policy; merge them "
        f"with peft's {merge}, "
        "copy the tokenizer beside it, and write policy.model: MERGED"
    )
