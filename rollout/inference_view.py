"""A view of the trainer's module that the engine runs: same classes, shared parameters, its own attention and packing."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from rollout.attention import SLOT_ATTENTION
from rollout.layer_probe import fuse_layers
from rollout.packed_linear import can_pack, pack_linears


class InferenceView:
    """A structural copy of ``model`` for decoding.

    The copy has its own modules and config, so that the attention function, hooks and packed layers plugged into it never
    show in the trainer. Its parameters *are* the trainer's where the dtype agrees; elsewhere they are casts (linears packed
    where the machine has a kernel) that `refresh` renews in place after each weight update. Decoder layers run as a
    `FusedLayer` where that computes the same.

    Modules compute what their classes say. Forwards and hooks that a trainer put on its instances, such as a fused loss, autocast
    or the gathering of partitioned weights, are about training, and the copy has none of them.

    Args:
        model: The trainer's unwrapped causal LM.
        dtype: What the engine computes in.

    Raises:
        ValueError: for a model whose attention cannot be replaced.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype) -> None:
        if not getattr(model, "_supports_attention_backend", False):
            raise ValueError(
                f"{type(model).__name__} does not let its attention be replaced (transformers' _supports_attention_backend is "
                "not set): choose a model that does, as Llama, Qwen, Mistral and Gemma do"
            )
        self.dtype = dtype
        device = model.device
        self._casts: list[tuple[nn.Parameter, nn.Parameter]] = []
        pack = can_pack(device, dtype)
        linear_only = _weights_read_by_linears_only(model) if pack else set()
        memo: dict[int, object] = {}
        for parameter in model.parameters():
            memo[id(parameter)] = self._view_of(parameter, keep_source=id(parameter) in linear_only)
        for buffer in model.buffers():
            memo[id(buffer)] = buffer
        self.module: PreTrainedModel = copy.deepcopy(model, memo)
        for module in self.module.modules():
            module.__dict__.pop("forward", None)
            module._forward_hooks.clear()
            module._forward_pre_hooks.clear()
        self.module.eval()
        self.module.set_attn_implementation(SLOT_ATTENTION)
        self.fused = fuse_layers(self.module, model, dtype, pack)
        self._packed = pack_linears(self.module, model) if pack else []

    def _view_of(self, parameter: nn.Parameter, keep_source: bool) -> nn.Parameter:
        if keep_source or parameter.dtype == self.dtype or not parameter.is_floating_point():
            return parameter
        cast = nn.Parameter(parameter.detach().to(self.dtype), requires_grad=False)
        self._casts.append((cast, parameter))
        return cast

    @torch.no_grad()
    def refresh(self) -> None:
        """Renews casts and packed weights from the trainer's parameters. Shared parameters need nothing."""
        for cast, source in self._casts:
            cast.copy_(source)
        for fused in self.fused:
            fused.refresh()
        for linear in self._packed:
            linear.refresh()


def _weights_read_by_linears_only(model: nn.Module) -> set[int]:
    """Ids of parameters that no module but an `nn.Linear` holds: packing replaces them, so they need no cast."""
    inside: set[int] = set()
    outside: set[int] = set()
    for module in model.modules():
        target = inside if type(module) is nn.Linear else outside
        target.update(id(p) for p in module.parameters(recurse=False))
    return inside - outside
