"""Linear layers whose weight is stored once in the layout that oneDNN reads fastest (CPU, bfloat16)."""

from __future__ import annotations

import torch
from torch import nn


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether `PackedLinear` has a kernel here."""
    return (
        device.type == "cpu"
        and dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )


class PackedLinear(nn.Module):
    """Inference-only copy of an `nn.Linear`, packed in bfloat16.

    The source layer keeps the (trainable, possibly float32) weight; `refresh` reads it again after an update.

    Args:
        source: The layer to copy. It is referenced, not registered, so it does not appear in this module's parameters.
    """

    def __init__(self, source: nn.Linear) -> None:
        super().__init__()
        self._source = [source]
        self.out_features = source.out_features
        self.refresh()

    def refresh(self) -> None:
        """Packs the source's present weight."""
        source = self._source[0]
        weight = source.weight.detach().to(torch.bfloat16).contiguous()
        self._packed = torch.ops.mkldnn._reorder_linear_weight(weight, 1)
        self._bias = None if source.bias is None else source.bias.detach().to(torch.bfloat16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: bfloat16 [..., in] → bfloat16 [..., out]."""
        return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")


def pack_linears(view: nn.Module, source: nn.Module) -> list[PackedLinear]:
    """Replaces every `nn.Linear` of ``view`` by a packed copy of the layer of the same name in ``source``; returns them."""
    packed = []
    for name, layer in source.named_modules():
        if type(layer) is nn.Linear:
            parent_name, _, attribute = name.rpartition(".")
            replacement = PackedLinear(layer)
            setattr(view.get_submodule(parent_name), attribute, replacement)
            packed.append(replacement)
    return packed
