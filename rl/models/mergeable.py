"""Checks that adapters merge exactly: the policy must compute the same with W + scaling · B A as its weight.

This is equation 3 of arXiv 2106.09685. The check accepts what is known to merge and rejects everything else,
because each release of peft adds new kinds of adapters.
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

# Fields of peft's LoraConfig that do not change the merged weights, or whose effect can be read off the
# layers. The merging test covers each of those that change the forward. Others must keep their defaults.
_ALLOWED_FIELDS = {
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
_ALLOWED_INITS = (True, False, "gaussian", "orthogonal", "pissa", "olora")


@dataclass(frozen=True, slots=True)
class AdaptedLayer:
    """A linear layer with an adapter.

    Attributes:
        adapter: Name of the adapter.
        scaling: Factor of B A.
        transposed: Whether the layer stores its weight as [in, out], as GPT-2's layers do.
    """

    adapter: str
    scaling: float
    transposed: bool

    def delta(self, down: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        """Returns the update of the layer's weight.

        Args:
            down: A, of shape [rank, in].
            up: B, of shape [out, rank].

        Returns:
            The float32 update [out, in], or [in, out] for a transposed layer.
        """
        product = self.scaling * (up.float() @ down.float())
        return product.T if self.transposed else product


def check_adapter_config(config: Any) -> None:
    """Rejects a peft config that asks for more than plain LoRA.

    Raises:
        ValueError: If a field is not known to merge exactly; the message names it and what to write.
    """
    from peft import LoraConfig

    if type(config) is not LoraConfig:
        raise ValueError(
            f"peft_type {_shown(config.peft_type)} is not known to merge exactly: train with peft's "
            "LoraConfig"
        )
    defaults = LoraConfig()
    for field in dataclasses.fields(config):
        value, default = getattr(config, field.name), getattr(defaults, field.name)
        if field.name not in _ALLOWED_FIELDS and (value or None) != (default or None):
            raise ValueError(
                f"{field.name} is {_shown(value)}, which is not known to merge exactly: write "
                f"{_shown(default)}"
            )
    init = config.init_lora_weights
    if init not in _ALLOWED_INITS and not str(init).startswith("pissa_niter_"):
        raise ValueError(f"init_lora_weights is {init!r}, which is not known to merge exactly: write True")


def adapted_layers(module: nn.Module, adapter: str = "default") -> dict[str, AdaptedLayer]:
    """Returns the layers that have the adapter, by their names in ``module``.

    Args:
        module: Policy with peft's layers.
        adapter: Name of the adapter.

    Raises:
        ValueError: If W + scaling · B A does not describe a layer; the message names it.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    uses = Counter(id(p) for _, p in module.named_parameters(remove_duplicate=False))
    layers = {}
    for name, submodule in module.named_modules():
        if isinstance(submodule, AuxiliaryTrainingWrapper):
            raise ValueError(
                f"{name} is a {type(submodule).__name__}, which is not known to merge exactly: leave "
                "modules_to_save and trainable_token_indices out"
            )
        if not isinstance(submodule, BaseTunerLayer):
            continue
        layer: Any = submodule
        reason = _inexact_reason(layer, adapter, uses)
        if reason is not None:
            raise ValueError(f"{name}: {reason}")
        if adapter in layer.lora_A:
            layers[name] = AdaptedLayer(adapter, float(layer.scaling[adapter]), bool(layer.fan_in_fan_out))
    return layers


def _inexact_reason(layer: Any, adapter: str, uses: Counter[int]) -> str | None:
    """Returns why a peft layer is not known to merge exactly, or None if it is.

    Args:
        layer: The peft layer.
        adapter: Name of the adapter.
        uses: Number of places in the model that use a parameter, by the parameter's ``id``.
    """
    from peft.tuners.lora.layer import Linear

    if type(layer).forward is not Linear.forward:
        kind = f"{type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__}"
        return f"peft's {kind} is not known to merge exactly: adapt linear layers"
    base: Any = layer.get_base_layer()
    if type(base).forward not in (nn.Linear.forward, Conv1D.forward) or not _is_plain(base.weight):
        return (
            f"a {type(base).__name__} is not known to merge exactly: adapt plain linear layers that are not "
            "quantized"
        )
    if list(layer.active_adapters) != [adapter] or layer.disable_adapters or layer.merged:
        return (
            f"the adapter {adapter} is not the active one, or is merged already: unmerge it and call "
            f"set_adapter({adapter!r})"
        )
    if adapter not in layer.lora_A:
        return None
    if (
        adapter in layer.lora_variant
        or layer.lora_bias.get(adapter)
        or not _is_plain(layer.lora_A[adapter].weight)
    ):
        return "its adapter is more than B A, or is quantized: use plain LoRA in floating point"
    if any(
        uses[id(p)] > 1 for p in (base.weight, layer.lora_A[adapter].weight, layer.lora_B[adapter].weight)
    ):
        return (
            "its weight is also that of another layer (tied), which the adapter would change too: adapt "
            "other layers"
        )
    return None


def _is_plain(weight: Any) -> bool:
    """Returns whether a weight is an ordinary floating-point matrix, sharded or not, and not quantized."""
    return (
        weight.is_floating_point()
        and weight.itemsize >= 2
        and (type(weight) is nn.Parameter or isinstance(weight, DTensor))
    )


def _shown(value: Any) -> str:
    text = str(getattr(value, "value", value))
    return text if len(text) <= 60 else text[:57] + "…"
