"""Gives the engine access to another trainer's policy.

The engine shares the policy's parameters if each rank holds all of them, and decodes with a copy otherwise.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Hashable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from paceline.rl.errors import UserError
from paceline.rl.integrations.fingerprint import fingerprint, tensors_held
from paceline.rl.models.initial import copy_weights
from paceline.rl.models.lora import merged_weights
from paceline.rl.models.mergeable import AdaptedLayer, adapted_layers, check_adapter_config
from paceline.rl.sharding.gathering import full_parameters, is_partitioned


class HostPolicy:
    """Follows the policy of a host, which is the trainer that uses the engine.

    Args:
        model: Unwrapped transformers causal LM, with or without peft's plain LoRA adapters in it or around
            it. Its parameters may be sharded by ZeRO 3 or FSDP2.
        dtype: Precision of a copy.
        device: Device of a copy.

    Attributes:
        shared: Whether the engine shares the host's parameters.
        decoded: Model to build the engine on: the host's own module, or the copy.

    Raises:
        UserError: If adapters are not known to merge exactly (`paceline.rl.models.mergeable`), weights are
            quantized, or parameters are flattened (FSDP1).
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self._adapter = _adapter_in_use(model)
        wrapped = self._adapter is not None and not isinstance(model, PreTrainedModel)
        self._source: nn.Module = model.get_base_model() if wrapped else model  # type: ignore[operator]
        if any("_flat_param" in name for name, _ in self._source.named_parameters()):
            raise UserError(
                "the policy is sharded by FSDP1, which flattens parameters: use FSDP2 (fsdp_version: 2)"
            )
        if not isinstance(self._source, PreTrainedModel):
            raise UserError(
                f"the policy is a {type(self._source).__name__}: pass the unwrapped transformers causal LM"
            )
        if getattr(self._source, "hf_quantizer", None) is not None:
            raise UserError(
                "the policy is quantized, and rollouts need the weights that are trained: load it in bfloat16"
            )
        self._layers()
        self.shared = self._adapter is None and not is_partitioned(self._source)
        self.decoded = self._source if self.shared else _empty_copy(self._source, dtype, device)
        self._model, self._parameters = model, list(self._source.parameters())

    def refresh(self) -> None:
        """Copies the host's current weights to the copy, if there is one. Collective if they are sharded."""
        if not self.shared:
            copy_weights(self._weights(), self.decoded)
            _copy_buffers(self._source, self.decoded)

    @property
    def is_partitioned(self) -> bool:
        """Whether no rank holds the whole weights."""
        return is_partitioned(self._source)

    def fingerprint(self) -> Hashable | None:
        """Returns a value that changes whenever this rank's weights or the state of their adapters change.

        It is None if the weights cannot be read, see `tensors_held`.
        """
        held = tensors_held(self._source)
        return None if held is None else (fingerprint(held), _adapter_state(self._source))

    def reads(self, model: nn.Module) -> bool:
        """Returns whether the engine that was built on `decoded` still follows this model.

        It does if the model and the adapter are the same, and, if parameters are shared, those are the same
        objects. Sharding a model, for example, replaces them.

        Args:
            model: The host's unwrapped model now.
        """
        if (
            model is not self._model
            or (self.shared and is_partitioned(self._source))
            or _adapter_in_use(model) != self._adapter
        ):
            return False
        now = list(self._source.parameters())
        return not self.shared or (
            len(now) == len(self._parameters) and all(map(operator.is_, now, self._parameters))
        )

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        def full_weights(wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
            return full_parameters(self._source, wanted)

        return merged_weights(full_weights, self._layers())

    def _layers(self) -> dict[str, AdaptedLayer] | None:
        """Returns the adapted layers as they are now, since the host may change scaling or active adapter."""
        if self._adapter is None:
            return None
        try:
            return adapted_layers(self._source, self._adapter)
        except ValueError as error:
            raise UserError(f"the policy's adapters: {error}") from None


def _empty_copy(source: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    # The constructor of the class, because from_config would shard the copy too under ZeRO 3. fork_rng keeps
    # the host's random state.
    with torch.random.fork_rng():
        model: PreTrainedModel = type(source)(copy.deepcopy(source.config))
    model.generation_config = source.generation_config
    for parameter in model.parameters():
        # only parameters are cast: buffers such as rotary frequencies keep their precision
        parameter.data = parameter.to(dtype)
    return model.to(device=device).eval().requires_grad_(False)  # type: ignore[call-arg]


@torch.no_grad()
def _copy_buffers(source: nn.Module, target: nn.Module) -> None:
    buffers = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        if name in buffers and buffers[name].shape == buffer.shape:
            buffer.copy_(buffers[name])


def _adapter_state(source: nn.Module) -> Hashable:
    """Returns which adapters peft's layers use now, with what scaling, and which are merged."""
    layers: list[Any] = [module for module in source.modules() if hasattr(module, "merged_adapters")]
    return tuple(
        (
            tuple(m.active_adapters),
            tuple(m.merged_adapters),
            m.disable_adapters,
            tuple(getattr(m, "scaling", {}).items()),
        )
        for m in layers
    )


def _adapter_in_use(model: Any) -> str | None:
    """Returns the name of the policy's active adapter; None for a policy without adapters.

    Raises:
        UserError: If not exactly one adapter is active, or its config asks for more than plain LoRA.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        return None
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer)]
    names = sorted({name for layer in layers for name in layer.active_adapters}) if layers else list(configs)
    if len(names) != 1:
        in_use = ", ".join(names) or "none"
        raise UserError(
            f"the policy's active adapters are {in_use}, and rollouts follow exactly one: call "
            f"set_adapter({next(iter(configs))!r})"
        )
    try:
        check_adapter_config(configs[names[0]])
    except ValueError as error:
        raise UserError(f"the policy's adapters: {error}") from None
    return names[0]
