"""What the updates need of a module that is trained, wherever its parts lie."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from paceline.drafter_trainer.storage.optimizer_state import check_moments


@dataclass(frozen=True, slots=True)
class AdamWSettings:
    """AdamW's, the norm that gradients are cut to, and the precision of the arithmetic (``bf16`` or
    ``no``).
    """

    lr: float
    weight_decay: float
    grad_clip: float
    precision: str

    def over(self, module: nn.Module, **options: Any) -> torch.optim.AdamW:
        """An optimizer of a module's trainable parameters."""
        return torch.optim.AdamW(trainable(module), lr=self.lr, weight_decay=self.weight_decay, **options)


class Trained(ABC):
    """A wrapped module with its AdamW.

    Attributes:
        module: Forwards that are differentiated go through it.
        in_lockstep: A forward or backward is an exchange between ranks: all run as many, in one order.
    """

    module: nn.Module
    in_lockstep: bool = False
    _optimizer: torch.optim.Optimizer

    @property
    def bare(self) -> nn.Module:
        """Forwards without gradients go through it."""
        return self.module

    def set_rate(self, lr: float) -> None:
        """The learning rate from now on."""
        for group in self._optimizer.param_groups:
            group["lr"] = lr

    def accumulating(self, last: bool) -> AbstractContextManager[None]:
        """Around a micro-batch's forward and backward; ``last`` of the optimizer step."""
        return nullcontext()

    @abstractmethod
    def backward(self, loss: torch.Tensor) -> None:
        """Accumulates the gradient of a micro-batch's loss; over ranks the mean is taken."""

    @abstractmethod
    def step(self) -> float:
        """One optimizer step on the gradients, cut to their norm, and left out where they are not finite.
        Collective.

        Returns:
            The norm before the cut; not finite where the step was left out.
        """

    @abstractmethod
    def full_weights(self, wanted: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
        """The present weights, whole, by their names in ``bare``, good until the next step. Collective: all
        go to the end.
        """

    @abstractmethod
    def optimizer_state(self) -> dict[str, Any]:
        """As `torch.optim.Optimizer.state_dict` of an optimizer that is not sharded. Collective; on the main
        rank.
        """

    @abstractmethod
    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Takes over what `optimizer_state` gave, on whatever number of ranks, sharded in whatever way.

        Raises:
            ValueError: for the state of another optimizer.
        """


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """Parameters with a gradient, in the module's order."""
    return [p for p in module.parameters() if p.requires_grad]


def checked_moments(
    state: dict[str, Any], parameters: list[nn.Parameter], shapes: list[torch.Size]
) -> list[dict[str, Any]]:
    """AdamW's entry for each parameter, once it is clear that they fit.

    Raises:
        ValueError: where they do not.
    """
    entries = state["state"]
    if entries and len(entries) != len(parameters):
        raise ValueError(f"it is of {len(entries)} parameters, not {len(parameters)}")
    check_moments(entries, shapes)
    return [entries.get(i, {}) for i in range(len(parameters))]


def as_state(entries: list[dict[str, Any]], group: dict[str, Any]) -> dict[str, Any]:
    """The state dict of an optimizer with one group of parameters."""
    plain = {k: v for k, v in group.items() if k != "params" and not isinstance(v, torch.Tensor)}
    state = {i: entry for i, entry in enumerate(entries) if entry}
    return {"state": state, "param_groups": [{**plain, "params": list(range(len(entries)))}]}


@dataclass(frozen=True, slots=True)
class WholeState:
    """What a checkpoint keeps of something trained: whole weights by name, and the optimizer's state."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]


def whole_state(weights: Iterator[tuple[str, torch.Tensor]], trained: Trained, main: bool) -> WholeState:
    """Gathers it. Collective.

    Args:
        weights: From `Trained.full_weights`, of ``trained``.
        trained: Whose optimizer.
        main: Whether this rank keeps them; others get nothing.
    """
    return WholeState({name: tensor.cpu() for name, tensor in weights if main}, trained.optimizer_state())
