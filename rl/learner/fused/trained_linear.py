"""Linear layers of one input whose outputs, and gradients, are products with packed weights."""

from __future__ import annotations

import torch
from torch import nn

from paceline.rollout.model.packed_linear import PackedLinear, padding_of
from paceline.rollout.native.gradients import GradientKernels
from paceline.rollout.native.products import PackedProducts


def can_train(products: PackedProducts, *layers: nn.Linear) -> bool:
    """Returns whether the kernels multiply by these layers' weights and by their transposes."""
    inputs, widths = layers[0].in_features, [layer.out_features for layer in layers]
    if len(widths) == 1:  # a lone layer's outputs are padded
        widths = [widths[0] + padding_of(widths[0])]
    return all(products.serves(width, inputs) and products.serves(inputs, width) for width in widths)


class TrainedLinear:
    """Applies float32 `nn.Linear` layers of one input as one product in bfloat16, as the engine does.

    Args:
        kernels: Kernels of the backward pass.
        products: Products with packed weights, which serve these shapes (`can_train`).
        *sources: The layers, either all with a bias or all without.
    """

    def __init__(self, kernels: GradientKernels, products: PackedProducts, *sources: nn.Linear) -> None:
        self._kernels, self._products, self._sources = kernels, products, sources
        self._packed = PackedLinear(*sources)
        self._packed.share()  # the engine does not decode during an update
        self._transposed: torch.Tensor | None = None
        self._transposed_is_old = True
        self._widths = [layer.out_features for layer in sources]
        self._padding = padding_of(self._widths[0]) if len(sources) == 1 else 0

    @property
    def parameters(self) -> list[torch.Tensor]:
        """The layers' weights, then their biases if they have them."""
        weights: list[torch.Tensor] = [layer.weight for layer in self._sources]
        return weights + [layer.bias for layer in self._sources if layer.bias is not None]

    def refresh(self) -> None:
        """Packs the layers' current weights."""
        self._packed.refresh()
        self._transposed_is_old = True

    def __call__(self, x: torch.Tensor, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Maps bfloat16 ``x`` [T, in] to the layers' outputs side by side, plus ``residual`` if given.

        The outputs of a lone layer are padded with −inf to whole panels, and their gradients with zeros.
        """
        return self._packed.padded(x, residual)

    def input_gradient(self, of_output: torch.Tensor) -> torch.Tensor:
        """Maps the gradient of the outputs, bfloat16 [T, sum of out], to that of the input [T, in]."""
        if self._transposed is None or self._transposed_is_old:
            weight = torch.cat([layer.weight.detach().to(torch.bfloat16) for layer in self._sources])
            self._transposed = self._kernels.pack_transposed(
                nn.functional.pad(weight, (0, 0, 0, self._padding)), self._transposed
            )
            self._transposed_is_old = False
        return self._products.multiply(of_output, self._transposed, None, None)

    def parameter_gradients(self, of_output: torch.Tensor, x: torch.Tensor) -> list[torch.Tensor | None]:
        """Returns the gradients of `parameters` in float32; None for those added to the parameter's ``grad``.

        Args:
            of_output: Gradient of the outputs, bfloat16 [T, sum of out].
            x: Input, bfloat16 [T, in].
        """
        packed, inputs = self._kernels.pack_transposed(of_output), self._kernels.pack_transposed(x)
        gradients: list[torch.Tensor | None] = []
        if self._padding:
            total = torch.zeros(len(packed), len(inputs))
            self._kernels.add_weight_gradient(packed, inputs, total)
            gradients.append(total[: self._widths[0]])
        else:
            for layer, of_layer in zip(self._sources, packed.split(self._widths), strict=True):
                total, returned = gradient_of(layer.weight)
                self._kernels.add_weight_gradient(of_layer, inputs, total)
                gradients.append(returned)
        if self._sources[0].bias is not None:
            gradients += of_output[:, : sum(self._widths)].float().sum(0).split(self._widths)
        return gradients


def gradient_of(parameter: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Returns where to add a parameter's gradient, and what to return to autograd.

    A gradient that is there already is added to in place, which saves two passes over memory; autograd then
    gets None, and still runs what waits for the parameter, such as the exchange between ranks.
    """
    grad = parameter.grad
    if grad is not None and grad.dtype == torch.float32 and grad.is_contiguous():
        return grad, None
    new = torch.zeros(parameter.shape)
    return new, new
