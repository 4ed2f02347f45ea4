"""Linear layers for decoding.

Layers that read one input are joined, and packed where there are kernels for it (CPU, bfloat16). On a CPU
with a compiler, no row of their outputs depends on another row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Protocol
from weakref import WeakValueDictionary

import torch
from torch import nn

from paceline.rollout.native import AnyKernels, Kernels, Operands
from paceline.rollout.native.products import PANEL, load_dot_products, load_products


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Returns whether `PackedLinear` has a kernel for this device and dtype."""
    on_cpu = device.type == "cpu" and dtype == torch.bfloat16
    return on_cpu and (load_products() is not None or _onednn_packs())


def padding_of(outputs: int) -> int:
    """Returns how many outputs are missing to whole panels."""
    return -outputs % PANEL


def _onednn_packs() -> bool:
    """Returns whether oneDNN multiplies bfloat16 weights that it has packed."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _renewed(old: torch.Tensor | None, new: torch.Tensor) -> torch.Tensor:
    """Returns the new values, in the old ones' memory if there are any."""
    return new if old is None else old.copy_(new)


class Projection(Protocol):
    """Applies one or more linear layers to one input and returns their outputs side by side."""

    def refresh(self) -> None:
        """Reads the sources' weights again."""
        ...

    def operands(self) -> Operands | None:
        """Returns the weights for the kernel of a whole layer, or None if it does not serve them."""
        ...

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Maps ``x`` [B, Q, in] to [B, Q, sum of out], plus ``residual`` of that shape if given."""
        ...


class PackedLinear(nn.Module):
    """Holds an inference-only copy of `nn.Linear` layers of one input, packed in bfloat16 as one matrix.

    It uses `PackedProducts`; outputs that are not whole panels are padded, and inputs that are not whole
    blocks go to `DotProducts`. Both make a row's result independent of the number of rows. Without a compiler
    it uses oneDNN or torch, which choose their kernel, and with it the rounding, by the number of rows.

    The source layers keep the (trainable, possibly float32) weights; `refresh` reads them again after an
    update.

    Args:
        *sources: Layers to copy, either all with a bias or all without. They are referenced, not registered,
            so they do not appear in this module's parameters.
    """

    _shared: ClassVar[WeakValueDictionary[tuple[int, ...], PackedLinear]] = WeakValueDictionary()

    def __init__(self, *sources: nn.Linear) -> None:
        super().__init__()
        self._sources = sources
        self._packed: torch.Tensor | None = None
        self._bias: torch.Tensor | None = None
        self.refresh()

    def share(self) -> None:
        """Lets what is built later on the same layers use this copy, which then has two that refresh it."""
        self._shared[tuple(map(id, self._sources))] = self

    @classmethod
    def shared(cls, *sources: nn.Linear) -> PackedLinear:
        """Returns the copy of these layers that is shared, or a new one."""
        # a shared copy keeps its layers alive, so none of theirs is another layer's id
        found = cls._shared.get(tuple(map(id, sources)))
        return cls(*sources) if found is None else found

    def refresh(self) -> None:
        """Packs the sources' current weights, in place because layers hold their addresses."""
        weight = torch.cat([layer.weight.detach().to(torch.bfloat16) for layer in self._sources])
        biases = [layer.bias for layer in self._sources if layer.bias is not None]
        bias = torch.cat([b.detach().to(torch.bfloat16) for b in biases]) if biases else None
        products, (outputs, inputs) = load_products(), weight.shape
        self._outputs, padding = outputs, padding_of(outputs)
        self._products = (
            products if products is not None and products.serves(outputs + padding, inputs) else None
        )
        if self._products is not None:
            if padding:
                bias = weight.new_zeros(outputs) if bias is None else bias
                bias = nn.functional.pad(bias, (0, padding), value=-torch.inf)
            self._packed = self._products.pack(nn.functional.pad(weight, (0, 0, 0, padding)), self._packed)
        else:
            self._dots = load_dot_products("cpu", torch.bfloat16)
            self._reordered = self._dots is None and _onednn_packs()
            self._packed = (
                torch.ops.mkldnn._reorder_linear_weight(weight, 1)
                if self._reordered
                else _renewed(self._packed, weight.contiguous())
            )
        self._bias = None if bias is None else _renewed(self._bias, bias)

    def operands(self) -> Operands | None:
        """Returns the weights for the kernel of a whole layer, see `Projection.operands`."""
        assert self._packed is not None
        if self._products is not None:
            # a padded output is no longer as wide as what the next kernel reads
            whole = len(self._packed) == self._outputs
            return Operands(((self._packed, self._bias),), packed=True) if whole else None
        return None if self._dots is None else Operands(((self._packed, self._bias),), packed=False)

    def padded(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Maps bfloat16 ``x`` [..., in] to bfloat16 outputs, padded with −inf to whole panels.

        There must be native products; ``residual`` has as many columns.
        """
        assert self._products is not None
        assert self._packed is not None
        return self._products.multiply(x, self._packed, self._bias, residual)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Maps bfloat16 ``x`` [..., in] to bfloat16 [..., out], plus ``residual`` if given."""
        if self._products is not None:
            padding = padding_of(self._outputs)
            if padding and residual is not None:
                residual = nn.functional.pad(residual, (0, padding))
            out = self.padded(x, residual)
            return out[..., : self._outputs] if padding else out
        assert self._packed is not None
        if self._dots is not None:
            return self._dots.multiply(x, [(self._packed, self._bias)], residual)
        if not self._reordered:
            out = nn.functional.linear(x, self._packed, self._bias)
            return out if residual is None else out + residual
        if residual is None:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._packed, self._bias, "add")


class JoinedLinear(nn.Module):
    """Applies the source layers to one input with their own weights, where nothing packs them.

    On a CPU it uses `DotProducts`, on a GPU the products of `TritonKernels`; both make a row's result
    independent of the number of rows. Nothing is copied, so there is nothing to refresh.

    Args:
        *sources: Layers to apply. They are referenced, not registered.
        kernels: Kernels of the sources' device, or None for torch's operators where `DotProducts` do not
            serve.
    """

    def __init__(self, *sources: nn.Linear, kernels: AnyKernels | None = None) -> None:
        super().__init__()
        self._sources = sources
        self._products = None if isinstance(kernels, Kernels) else kernels

    def refresh(self) -> None:
        """Does nothing: the weights are the sources' own."""

    def operands(self) -> Operands | None:
        """Returns the weights for the kernel of a whole layer, see `Projection.operands`."""
        layers = self.layers
        first = layers[0][0]
        served = load_dot_products(first.device.type, first.dtype) is not None
        if not served or not all(w.dtype == first.dtype and w.is_contiguous() for w, _ in layers):
            return None
        return Operands(layers, packed=False)

    def forward(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Maps ``x`` [..., in] to [..., sum of out], plus ``residual`` of that shape if given."""
        if self._products is not None and x.dtype == self._sources[0].weight.dtype:
            return self._products.linear(x, self.layers, residual)
        operands, dots = self.operands(), load_dot_products(x.device.type, x.dtype)
        if operands is not None and dots is not None and operands.layers[0][0].dtype == x.dtype:
            return dots.multiply(x, operands.layers, residual)
        parts = [nn.functional.linear(x, weight, bias) for weight, bias in self.layers]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1)
        return out if residual is None else out + residual

    @property
    def layers(self) -> tuple[tuple[torch.Tensor, torch.Tensor | None], ...]:
        """The layers' current weights and biases."""
        return tuple((layer.weight, layer.bias) for layer in self._sources)


def project(layers: Projection, x: torch.Tensor, kernels: AnyKernels) -> Any:
    """Applies linear layers to ``x`` [1, N, in]; returns what the next of the kernels reads."""
    if isinstance(kernels, Kernels):
        return layers(x)
    assert isinstance(layers, JoinedLinear)
    return kernels.multiply(x, layers.layers)


def project_gate(layers: Projection, x: torch.Tensor, kernels: AnyKernels) -> torch.Tensor:
    """Applies gate and up projections to ``x`` [1, N, in]; returns silu(gate) · up, [1, N, out]."""
    if isinstance(kernels, Kernels):
        return kernels.silu_gate(layers(x))
    assert isinstance(layers, JoinedLinear)
    return kernels.gate(x, layers.layers)


def joinable(layers: Sequence[nn.Module]) -> bool:
    """Returns whether the layers are plain `nn.Linear`, either all with a bias or all without."""
    return (
        all(type(layer) is nn.Linear for layer in layers)
        and len({layer.bias is None for layer in layers}) == 1
    )


def replace_linears(
    view: nn.Module, source: nn.Module, packed: bool, kernels: AnyKernels | None
) -> list[PackedLinear] | list[JoinedLinear]:
    """Replaces every `nn.Linear` left in ``view`` by one for decoding.

    Args:
        view: The engine's own copy of the model; changed in place.
        source: The trainer's model.
        packed: Whether to pack copies of the source's layers of the same names; otherwise the view's own
            weights are used.
        kernels: Kernels of the view's device, if it has any.

    Returns:
        The new layers.
    """
    replaced: list[Any] = []
    sources = dict(source.named_modules())
    for name, layer in list(view.named_modules()):
        if type(layer) is nn.Linear:
            parent_name, _, attribute = name.rpartition(".")
            layer_source = sources[name]
            assert isinstance(layer_source, nn.Linear)
            replacement = (
                PackedLinear.shared(layer_source) if packed else JoinedLinear(layer, kernels=kernels)
            )
            setattr(view.get_submodule(parent_name), attribute, replacement)
            replaced.append(replacement)
    return replaced
