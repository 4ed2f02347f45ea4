"""The interface of a module that is trained, however it is sharded."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn


@dataclass(frozen=True, slots=True)
class AdamWSettings:
    """Settings of AdamW and of the update.

    Attributes:
        lr: Learning rate.
        weight_decay: Weight decay.
        grad_clip: Norm that gradients are clipped to.
        precision: Precision of the arithmetic, ``bf16`` or ``no`` (float32).
    """

    lr: float
    weight_decay: float
    grad_clip: float
    precision: str

    def over(self, module: nn.Module, **options: Any) -> torch.optim.AdamW:
        """Returns an optimizer of a module's trainable parameters."""
        return torch.optim.AdamW(trainable(module), lr=self.lr, weight_decay=self.weight_decay, **options)


class TrainedModule(ABC):
    """A wrapped module with its AdamW.

    Attributes:
        module: Wrapped module, for forward passes that are differentiated.
        in_lockstep: Whether each forward or backward pass communicates, so that all ranks must run equally
            many in one order.
    """

    module: nn.Module
    in_lockstep: bool = False
    _optimizer: torch.optim.Optimizer

    @property
    def unwrapped(self) -> nn.Module:
        """The module without its wrapper, for forward passes without gradients."""
        return self.module

    def set_rate(self, lr: float) -> None:
        """Sets the learning rate."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Returns the context manager around a micro-batch's forward and backward pass.

        Args:
            last: Whether this is the last micro-batch of the optimizer step.
        """
        return nullcontext()

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates the gradient of a micro-batch's loss; ranks average their gradients."""

    @abstractmethod
    def step(self) -> float:
        """Clips the gradients and makes an optimizer step; skips it if they are not finite. Collective.

        Returns:
            The gradient norm before clipping; not finite if the step was skipped.
        """

    @abstractmethod
    def full_weights(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the current full weights by their names in ``unwrapped``; valid until the next step.

        Collective: every rank must exhaust the iterator.

        Args:
            wanted: Function that says whether a name is wanted.
        """

    @abstractmethod
    def optimizer_state(self) -> dict[str, Any]:
        """Returns a state dict as `torch.optim.Optimizer.state_dict` of an unsharded optimizer. Collective.

        Only the main rank's result is complete.
        """

    @abstractmethod
    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Loads what `optimizer_state` returned, with any number of ranks and any kind of sharding.

        Raises:
            ValueError: The state belongs to another optimizer.
        """


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that require gradients, in the module's order."""
    return [p for p in module.parameters() if p.requires_grad]
