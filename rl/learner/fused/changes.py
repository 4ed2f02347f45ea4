"""Notices when a module's parameters have changed, so that copies of them are renewed."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

_watching: weakref.WeakSet[ParameterChanges] = weakref.WeakSet()


class ParameterChanges:
    """Notices changes of a module's parameters in place, by optimizers or otherwise, and moves in memory.

    Versions that torch counts are not enough: the fused kernels of its optimizers do not count theirs.
    Therefore every optimizer of this process reports its steps.

    Args:
        module: The module; its parameters stay the same objects.
    """

    def __init__(self, module: nn.Module) -> None:
        self._parameters = list(module.parameters())
        self._ids = {id(p) for p in self._parameters}
        self._seen: list[int] = []
        self._stepped = False
        _watching.add(self)

    def since_last_call(self) -> bool:
        """Returns whether parameters may have changed since the last call; True at the first."""
        now = [number for p in self._parameters for number in (p._version, p.data_ptr())]
        changed, self._seen, self._stepped = self._stepped or now != self._seen, now, False
        return changed

    def note_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes note that an optimizer has made a step."""
        trained = (id(p) for group in optimizer.param_groups for p in group["params"])
        self._stepped = self._stepped or not self._ids.isdisjoint(trained)


def _report_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
    for changes in _watching:
        changes.note_step(optimizer)


register_optimizer_step_post_hook(_report_step)
