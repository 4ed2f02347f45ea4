"""Adds LoRA adapters to the policy through peft, merges them for the engine, and saves and loads them."""

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

_BASE_LAYER = ".base_layer."  # part of the names of an adapted layer's own weights
_PEFT_PREFIX = "base_model.model."  # peft puts it before each name in its files


@dataclass(frozen=True, slots=True)
class AdapterBase:
    """The base model that adapters belong to, as their ``adapter_config.json`` names it.

    Attributes:
        name: Hub id or directory.
        revision: Commit on the hub; None for a directory.
    """

    name: str
    revision: str | None = None


def add_adapters(
    policy: PreTrainedModel, lora: LoraConfig, seed: int, base: AdapterBase | None = None
) -> None:
    """Adds adapters to the policy and freezes everything else.

    The adapters' product B A starts at zero. They are the same on every rank that uses the same seed.

    Args:
        policy: Policy to change in place.
        lora: The recipe's ``scale.lora``.
        seed: Seed of the random A; B is zero.
        base: Base model to name in the config of saved adapters, where peft looks for the weights.

    Raises:
        UserError: If peft is not installed, a target matches no layer, or an adapter would not merge exactly.
    """
    try:
        from peft import LoraConfig as PeftLoraConfig
        from peft import inject_adapter_in_model
    except ImportError:
        raise UserError("scale.lora needs peft: pip install 'paceline[lora]'") from None
    targets = list(lora.targets) or _linear_names(policy)
    _check_targets(policy, targets)
    config = PeftLoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
    )
    if base is not None:
        config.base_model_name_or_path, config.revision = base.name, base.revision
    try:
        with torch.random.fork_rng(), warnings.catch_warnings():
            # peft warns that it sets fan_in_fan_out for GPT-2's layers, which is right, and that lm_head is
            # tied, which adapted_layers rejects below
            warnings.simplefilter("ignore", UserWarning)
            torch.manual_seed(seed)
            inject_adapter_in_model(config, policy)
        adapted_layers(policy)
    except (ValueError, TypeError) as error:
        raise UserError(f"scale.lora.targets: {one_line(error, 240)}") from None


def _linear_names(policy: PreTrainedModel) -> list[str]:
    modules = policy.base_model.named_modules()
    return sorted(
        {name.rpartition(".")[2] for name, module in modules if isinstance(module, torch.nn.Linear | Conv1D)}
    )


def _check_targets(policy: PreTrainedModel, targets: list[str]) -> None:
    names = [name for name, _ in policy.named_modules()]
    for target in targets:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            known = ", ".join(_linear_names(policy))
            raise UserError(
                f"scale.lora.targets: no layer is named {target!r}; write some of {known}, or [] for all"
            )


def merged_weights(
    full_weights: Callable[[Callable[[str], bool]], Iterator[tuple[str, torch.Tensor]]],
    layers: Mapping[str, AdaptedLayer] | None,
) -> Iterator[tuple[str, torch.Tensor]]:
    """Yields full weights with adapters merged, under the names that they have without adapters.

    The weight of an adapted layer becomes W + scaling · B A (equation 3 of arXiv 2106.09685).

    Args:
        full_weights: Function such as `paceline.rl.sharding.TrainedModule.full_weights`, which yields the
            names and unsharded tensors of the parameters whose names it is asked for.
        layers: Result of `adapted_layers`, keyed by the names that ``full_weights`` uses; None if there are
            no adapters.
    """
    if layers is None:
        yield from full_weights(lambda name: True)
        return
    factors = dict(full_weights(lambda name: ".lora_" in name))
    for name, tensor in full_weights(lambda name: ".lora_" not in name):
        layer, separator, rest = name.partition(_BASE_LAYER)
        if rest == "weight" and layer in layers:
            adapted = layers[layer]
            down, up = (factors[f"{layer}.lora_{side}.{adapted.adapter}.weight"] for side in "AB")
            tensor = tensor + adapted.delta(down, up).to(tensor.device)
        yield f"{layer}.{rest}" if separator else name, tensor


def save_adapters(policy: PreTrainedModel, weights: dict[str, torch.Tensor], folder: Path) -> None:
    """Writes peft's ``adapter_config.json`` and ``adapter_model.safetensors``.

    Args:
        policy: Policy with adapters.
        weights: Full tensors of the adapters on the CPU, by their names in the policy.
        folder: Directory to write to; it is created if necessary.

    Raises:
        OSError: If the disk is full or not writable.
        SafetensorError: If safetensors cannot write the file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config: Any = policy.peft_config
    config["default"].save_pretrained(str(folder))
    tensors = {_PEFT_PREFIX + n.replace(".default.", "."): t.contiguous() for n, t in weights.items()}
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


@contextmanager
def without_adapters(policy: PreTrainedModel) -> Iterator[None]:
    """Disables the policy's adapters inside the block, so that it computes what its base model does."""
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
    """Loads ``adapter_model.safetensors`` into the policy's existing adapters.

    Args:
        policy: Policy with adapters, whose weights are overwritten.
        path: Directory that `save_adapters` wrote.

    Raises:
        UserError: If the file is truncated or missing, belongs to other layers, or holds non-finite numbers.
    """
    try:
        tensors = load_file(path / "adapter_model.safetensors")
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{path}: adapter_model.safetensors is truncated or missing ({error}); resume from another "
            "checkpoint"
        ) from None
    for name, parameter in policy.named_parameters():
        if ".lora_" in name:
            saved = tensors.get(_PEFT_PREFIX + name.replace(".default.", "."))
            if saved is None or saved.shape != parameter.shape:
                raise UserError(
                    f"{path}: has no adapter for {name}, or one of another rank; resume with the scale.lora "
                    "that the run was started with"
                )
            if not saved.is_floating_point() or not bool(saved.isfinite().all()):
                raise UserError(
                    f"{path}: the adapter for {name} has non-finite numbers; resume from another checkpoint"
                )
            parameter.copy_(saved)


def reject_adapter_directory(folder: Path) -> None:
    """Rejects a directory that holds adapters but not the policy that they belong to.

    Raises:
        UserError: If it is such a directory; the message says how to merge the adapters.
    """
    adapter_config = folder / "adapter_config.json"
    if not adapter_config.is_file() or (folder / "config.json").is_file():
        return
    try:
        base = json.loads(adapter_config.read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError):
        base = None
    load = f"AutoPeftModelForCausalLM.from_pretrained({str(folder)!r})"
    merge = f"{load}.merge_and_unload().save_pretrained('MERGED')"
    raise UserError(
        f"policy.model {folder}: holds adapters of {base or 'an unnamed policy'}, not a policy; merge them "
        f"with peft's {merge}, copy the tokenizer into MERGED, and write policy.model: MERGED"
    )
