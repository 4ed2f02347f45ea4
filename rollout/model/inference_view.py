"""A view of the trainer's module that the engine runs, with shared parameters and its own attention."""

from __future__ import annotations

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from paceline.rollout.model.attention import SLOT_ATTENTION
from paceline.rollout.model.fused_layer import RootMeanSquareNorm
from paceline.rollout.model.fusion_check import fuse_layers
from paceline.rollout.model.packed_linear import can_pack, replace_linears
from paceline.rollout.native import AnyKernels, Kernels
from paceline.rollout.text_limits import fix_rotary
from paceline.rollout.transformers_api import use_attention


class InferenceView:
    """Copies the structure of ``model`` for decoding and shares its parameters.

    The copy has its own modules and config, so the attention function, hooks and packed layers plugged into
    it do not affect the trainer. Its parameters *are* the trainer's where the dtype matches. Elsewhere they
    are casts (linear layers packed where the machine has a kernel), which `refresh` renews in place after
    each weight update. Decoder layers run as a `FusedLayer` where that computes the same.

    Modules compute what their classes define. Forwards and hooks that a trainer attached to its instances,
    such as a fused loss, autocast or the gathering of partitioned weights, serve training only, and the copy
    drops them.

    Args:
        model: The trainer's unwrapped causal LM.
        dtype: Compute dtype of the engine.
        fuse: Whether decoder layers may run as a `FusedLayer`.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, fuse: bool = True) -> None:
        self.dtype = dtype
        device = model.device
        self._casts: list[tuple[nn.Parameter, nn.Parameter]] = []
        self._shared: list[torch.Tensor] = list(model.buffers())
        pack = can_pack(device, dtype)
        linear_only = _weights_read_by_linears_only(model) if pack else set()
        memo: dict[int, object] = {}
        for parameter in model.parameters():
            memo[id(parameter)] = self._view_of(parameter, keep_source=id(parameter) in linear_only)
        self.module: PreTrainedModel = copy_sharing(model, memo)
        fix_rotary(self.module)
        use_attention(self.module, SLOT_ATTENTION)
        self.fused = fuse_layers(self.module, model, dtype, pack) if fuse else []
        kernels = self.kernels
        replaced = device.type == "cpu" or kernels is not None
        self._linears = replace_linears(self.module, model, pack, kernels) if replaced else []
        self._norms = _replace_norms(self.module, dtype, kernels)

    def _view_of(self, parameter: nn.Parameter, keep_source: bool) -> nn.Parameter:
        """Returns the parameter itself where it can be shared, else a cast that `refresh` renews."""
        if keep_source or parameter.dtype == self.dtype or not parameter.is_floating_point():
            self._shared.append(parameter)
            return parameter
        cast = nn.Parameter(parameter.detach().to(self.dtype), requires_grad=False)
        self._casts.append((cast, parameter))
        return cast

    @property
    def fusion(self) -> str:
        """A one-line summary of the decoder layers that run fused."""
        layers = self.module.config.get_text_config().num_hidden_layers
        native = sum(layer.takes_ragged for layer in self.fused)
        return f"{len(self.fused)} of {layers} decoder layers fused, {native} with native kernels"

    @property
    def kernels(self) -> AnyKernels | None:
        """The native kernels if every layer runs on them; a forward then needs no padding."""
        layers = self.module.config.get_text_config().num_hidden_layers
        every = len(self.fused) == layers and all(layer.takes_ragged for layer in self.fused)
        return self.fused[0].kernels if every else None

    def addresses(self) -> tuple[int, ...]:
        """Returns where the tensors are that are shared with the trainer, who may move them."""
        return tuple(x.data_ptr() for x in self._shared)

    @torch.no_grad()
    def refresh(self) -> None:
        """Renews casts and packed weights from the trainer's parameters; shared ones need nothing."""
        for cast, source in self._casts:
            cast.copy_(source)
        for fused in self.fused:
            fused.refresh()
        for part in (*self._linears, *self._norms):
            part.refresh()


class _Norm(nn.Module):
    """Runs a norm in place of the module that it was made of."""

    def __init__(self, norm: RootMeanSquareNorm) -> None:
        super().__init__()
        self._norm = norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self._norm(x)


def _replace_norms(
    view: nn.Module, dtype: torch.dtype, kernels: AnyKernels | None
) -> list[RootMeanSquareNorm]:
    """Replaces the norms outside fused layers on a GPU, where torch's mean rounds by the number of rows."""
    if kernels is None or isinstance(kernels, Kernels):
        return []
    replaced: list[RootMeanSquareNorm] = []
    for name, module in list(view.named_modules()):
        try:
            norm = RootMeanSquareNorm(module, dtype, kernels)
        except ValueError:
            continue
        parent_name, _, attribute = name.rpartition(".")
        setattr(view.get_submodule(parent_name), attribute, _Norm(norm))
        replaced.append(norm)
    return replaced


def copy_sharing(model: PreTrainedModel, tensors: dict[int, object] | None = None) -> PreTrainedModel:
    """Returns a copy of a model in eval mode that has its own modules and config but shares tensors.

    Hooks and forwards attached to the model's instances are not copied.

    Args:
        model: Model to copy.
        tensors: Parameters of the copy by the id of the model's parameter; None shares all. Buffers are
            always shared.
    """
    memo: dict[int, object] = {id(p): p for p in model.parameters()} if tensors is None else dict(tensors)
    memo.update((id(buffer), buffer) for buffer in model.buffers())
    copied = copy.deepcopy(model, memo)
    for module in copied.modules():
        module.__dict__.pop("forward", None)
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    return copied.eval()


def _weights_read_by_linears_only(model: nn.Module) -> set[int]:
    """Returns the ids of parameters that only `nn.Linear` modules hold.

    Packing replaces them, so they need no cast.
    """
    in_linears: set[int] = set()
    elsewhere: set[int] = set()
    for module in model.modules():
        target = in_linears if type(module) is nn.Linear else elsewhere
        target.update(id(p) for p in module.parameters(recurse=False))
    return in_linears - elsewhere
