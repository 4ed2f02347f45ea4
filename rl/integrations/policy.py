"""Somebody else's policy, as the engine decodes with it: in place where each rank holds it whole, else as a copy."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rl.errors import UserError
from rl.lora import merged
from rl.sharding.gathering import in_parts, whole_parameters
from rl.starting import copy_weights


class HostPolicy:
    """A host's policy.

    Args:
        model: Unwrapped: a transformers causal LM, or peft's model around one with plain LoRA adapters. Its parameters may be
            partitioned by ZeRO 3 or FSDP2.
        dtype: Of a copy.
        device: Of a copy.

    Attributes:
        decoded: What the engine is to be built on: the host's own module, or the copy.

    Raises:
        UserError: for adapters that are more than W + scaling · B A, and for flattened parameters (FSDP1).
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
        adapters = getattr(model, "peft_config", None)
        self._scaling = None if adapters is None else _lora_scaling(adapters)
        self._source: nn.Module = model if adapters is None else model.base_model.model  # type: ignore[assignment,union-attr]
        if any("_flat_param" in name for name, _ in self._source.named_parameters()):
            raise UserError("the policy is sharded by FSDP's first form, without names of parameters: use FSDP2 (fsdp_version: 2)")
        if not isinstance(self._source, PreTrainedModel):
            raise UserError(f"the policy is a {type(self._source).__name__}: hand over the unwrapped transformers causal LM")
        self.shared = self._scaling is None and not in_parts(self._source)
        self.decoded = self._source if self.shared else _empty_copy(self._source, dtype, device)

    def refresh(self) -> None:
        """Brings a copy up to the host's present weights. Collective where those lie in parts."""
        if not self.shared:
            copy_weights(self._weights(), self.decoded)

    def _weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        def whole(wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
            return whole_parameters(self._source, wanted)

        return merged(whole, self._scaling)


def _empty_copy(source: PreTrainedModel, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    # The class itself: from_config would partition the copy under ZeRO 3 too. The host's random numbers stay as they are.
    with torch.random.fork_rng():
        made: PreTrainedModel = type(source)(copy.deepcopy(source.config))
    made.generation_config = source.generation_config
    return made.to(device=device, dtype=dtype).eval().requires_grad_(False)  # type: ignore[call-arg]


def _lora_scaling(adapters: Any) -> float:
    """B A's factor, where peft's config says nothing that merging would leave out."""
    config = adapters.get("default")
    if config is None or len(adapters) > 1:
        raise UserError(f"the policy has the adapters {', '.join(adapters)}: rollouts follow one, named default")
    asked = ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "trainable_token_indices", "megatron_config")
    more = [name for name in asked if getattr(config, name, None)]
    if str(getattr(config.peft_type, "value", config.peft_type)) != "LORA" or getattr(config, "bias", "none") != "none" or more:
        what = ", ".join(more) or f"{config.peft_type} with bias {getattr(config, 'bias', None)}"
        raise UserError(f"the policy's adapters are more than plain LoRA ({what}): rollouts merge W + scaling · B A only")
    return float(config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r))
