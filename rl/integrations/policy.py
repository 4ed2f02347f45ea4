"""Somebody else's policy, as the engine decodes with it: in place where each rank holds it whole, else as a
copy.
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
from paceline.rl.sharding.gathering import in_parts, whole_parameters


class HostPolicy:
    """A host's policy.

    Args:
        model: Unwrapped: a transformers causal LM, also with peft's plain LoRA adapters in it or around it.
            Its parameters may be partitioned by ZeRO 3 or FSDP2.
        dtype: Of a copy.
        device: Of a copy.

    Attributes:
        decoded: What the engine is to be built on: the host's own module, or the copy.

    Raises:
        UserError: for adapters that are not known to merge exactly (`paceline.rl.models.mergeable`),
            quantized weights, and flattened parameters (FSDP1).
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        self._adapter = _adapter_in_use(model)
        around = self._adapter is not None and not isinstance(model, PreTrainedModel)
        self._source: nn.Module = model.get_base_model() if around else model  # type: ignore[operator]
        if any("_flat_param" in name for name, _ in self._source.named_parameters()):
            raise UserError(
                "the policy is sharded by FSDP's first form, without names of parameters: use FSDP2 "
                "(fsdp_version: 2)"
            )
        if not isinstance(self._source, PreTrainedModel):
            raise UserError(
                f"the policy is a {type(self._source).__name__}: hand over the unwrapped transformers causal "
                "LM"
            )
        if getattr(self._source, "hf_quantizer", None) is not None:
            raise UserError(
                "the policy is quantized: rollouts follow the weights that are trained; load it in bfloat16"
            )
        self._layers()
        self.shared = self._adapter is None and not in_parts(self._source)
        self.decoded = self._source if self.shared else _empty_copy(self._source, dtype, device)
        self._model, self._parameters = model, list(self._source.parameters())

    def refresh(self) -> None:
        """Brings a copy up to the host's present weights. Collective where those lie in parts."""
        if not self.shared:
            copy_weights(self._weights(), self.decoded)
            _copy_buffers(self._source, self.decoded)

    @property
    def in_parts(self) -> bool:
        """Whether no rank holds the whole weights."""
        return in_parts(self._source)

    def fingerprint(self) -> Hashable | None:
        """What changes whenever this rank's weights do, or what adapters do with them; None where that cannot
        be told.
        """
        held = tensors_held(self._source)
        return None if held is None else (fingerprint(held), _adapter_state(self._source))

    def reads(self, model: nn.Module) -> bool:
        """Whether the engine, built on `decoded`, follows this model: the same modules and adapter, and the
        same parameters if it shares them (sharding a model, for one, puts others in their place).
        """
        if (
            model is not self._model
            or (self.shared and in_parts(self._source))
            or _adapter_in_use(model) != self._adapter
        ):
            return False
        now = list(self._source.parameters())
        return not self.shared or (
            len(now) == len(self._parameters) and all(map(operator.is_, now, self._parameters))
        )

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        def whole(wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
            return whole_parameters(self._source, wanted)

        return merged_weights(whole, self._layers())

    def _layers(self) -> dict[str, AdaptedLayer] | None:
        """The adapted layers as they are now: their scaling may be changed, and the adapter in use."""
        if self._adapter is None:
            return None
        try:
            return adapted_layers(self._source, self._adapter)
        except ValueError as error:
            raise UserError(f"the policy's adapters: {error}") from None


def _empty_copy(source: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    # The class itself: from_config would partition the copy under ZeRO 3 too. The host's random numbers stay
    #     as they are.
    with torch.random.fork_rng():
        made: PreTrainedModel = type(source)(copy.deepcopy(source.config))
    made.generation_config = source.generation_config
    for parameter in made.parameters():
        # buffers, such as rotary frequencies, keep the precision that they were made in
        parameter.data = parameter.to(dtype)
    return made.to(device=device).eval().requires_grad_(False)  # type: ignore[call-arg]


@torch.no_grad()
def _copy_buffers(source: nn.Module, target: nn.Module) -> None:
    theirs = dict(source.named_buffers())
    for name, buffer in target.named_buffers():
        if name in theirs and theirs[name].shape == buffer.shape:
            buffer.copy_(theirs[name])


def _adapter_state(source: nn.Module) -> Hashable:
    """What peft's layers do with their adapters at the moment: which are in use, by what factor, and which
    are merged.
    """
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
    """The name of the one adapter that the policy runs with; None for a policy without any.

    Raises:
        UserError: for several at once, and for adapters whose config asks for more than plain LoRA.
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
            f"the policy runs with the adapters {in_use}: rollouts follow one, "
            f"set_adapter({next(iter(configs))!r})"
        )
    try:
        check_adapter_config(configs[names[0]])
    except ValueError as error:
        raise UserError(f"the policy's adapters: {error}") from None
    return names[0]
