"""Which adapters merge exactly: W + scaling · B A is then the policy's own forward (equation 3 of arXiv
2106.09685).

What is not known to merge is refused, whatever it is: peft gains new kinds with each release.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers.pytorch_utils import Conv1D

# Fields of peft's LoraConfig that do not change what is merged, or whose effect the layers themselves tell.
# The test of merging has a case for each of those that change the forward; every other field must have its
# default.
_FREE = {
    *(
        "peft_type",
        "task_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
    ),
    *("runtime_config", "megatron_core", "qalora_group_size"),
    *(
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "fan_in_fan_out",
        "init_lora_weights",
    ),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
}
_FIRST_WEIGHTS = (True, False, "gaussian", "orthogonal", "pissa", "olora")


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """A layer with an adapter.

    Attributes:
        adapter: Its name.
        scaling: B A is added so many times.
        transposed: The layer keeps its weight as [in, out], as GPT-2's does.
    """

    adapter: str
    scaling: float
    transposed: bool

    def delta(self, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """What is added to the weight, float32, from A [rank, in] and B [out, rank]."""
        product = self.scaling * (up.float() @ down.float())
        return product.T if self.transposed else product


def check_adapter_config(config: Any) -> None:
    """Refuses a peft config that asks for more than plain LoRA.

    Raises:
        ValueError: with the key and what to write.
    """
    from peft import LoraConfig

    if type(config) is not LoraConfig:
        raise ValueError(
            f"peft_type {_plain(config.peft_type)} is not known to merge exactly: train with peft's "
            "LoraConfig"
        )
    usual = LoraConfig()
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), getattr(usual, field.name)
        if field.name not in _FREE and (value or None) != (default or None):
            raise ValueError(
                f"{field.name} is {_plain(value)}, which is not known to merge exactly: write "
                f"{_plain(default)}"
            )
    first = config.init_lora_weights
    if first not in _FIRST_WEIGHTS and not str(first).startswith("pissa_niter_"):
        raise ValueError(f"init_lora_weights is {first!r}, which is not known to merge exactly: write True")


def adapted_layers(module: nn.Module, adapter: str = "default") -> dict[str, AdaptedLayer]:
    """The layers that have the adapter, by their names in ``module``.

    Raises:
        ValueError: for a layer that W + scaling · B A does not describe, by name.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    found = {}
    for name, part in module.named_modules():
        if isinstance(part, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"{name} is trained or kept as a {type(part).__name__}, which is not known to merge exactly: "
                "leave modules_to_save and trainable_token_indices out"
            )
        if not isinstance(part, BaseTunerLayer):
            continue
        layer: Any = part
        reason = _inexact(layer, adapter, uses)
        if reason is not None:
            raise ValueError(f"{name}: {reason}")
        if adapter in layer.lora_A:
            found[name] = AdaptedLayer(adapter, float(layer.scaling[adapter]), bool(layer.fan_in_fan_out))
    return found


def _inexact(layer: Any, adapter: str, uses: Counter[int]) -> str | None:
    """Why a peft layer does not merge exactly; None where it does."""
    from peft.tuners.lora.layer import Linear

    if type(layer).forward is not Linear.forward:
        kind = f"{type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__}"
        return f"peft's {kind} is not known to merge exactly: adapt linear layers"
    base: Any = layer.get_base_layer()
    if type(base).forward not in (nn.Linear.forward, Conv1D.forward) or not _is_plain(base.weight):
        return (
            f"a {type(base).__name__} is not known to merge exactly: adapt plain linear layers, not quantized"
        )
    if list(layer.active_adapters) != [adapter] or layer.disable_adapters or layer.merged:
        return (
            f"the adapter {adapter} is not the one in use, or is merged already: set_adapter({adapter!r}), "
            f"unmerged"
        )
    if adapter not in layer.lora_A:
        return None
    if (
        adapter in layer.lora_variant
        or layer.lora_bias.get(adapter)
        or not _is_plain(layer.lora_A[adapter].weight)
    ):
        return "its adapter is more than B A, or is not plain numbers"
    if any(
        uses[id(p)] > 1 for p in (base.weight, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
    ):
        return (
            "its weight is also that of another layer (tied), which the adapter must not change: adapt other "
            "layers"
        )
    return None


def _is_plain(weight: Any) -> bool:
    """Whether a weight is an ordinary floating-point matrix, perhaps in parts, and no quantized form of
    one.
    """
    return (
        weight.is_floating_point()
        and weight.itemsize >= 2
        and (type(weight) is nn.Parameter or isinstance(weight, DTensor))
    )


def _plain(value: Any) -> str:
    text = str(getattr(value, "value", value))
    return text if len(text) <= 60 else text[:57] + "…"
