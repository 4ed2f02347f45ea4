"""AdamW whose step looks one gradient ahead."""

from __future__ import annotations

from collections.abc import Callable

import torch


class OptimisticAdamW(torch.optim.AdamW):
    """AdamW on 2 g_t − g_{t−1}: the last gradient is the hint of what the next will be.

    Optimistic online learning, as OnlineSpec does it for drafters (Qian et al., "When Drafts Evolve", arXiv
    2603.12617): where the policy moves slowly, consecutive gradients are alike, and what changed between them
    tells more about the next one than the last itself. The first step has no hint and is AdamW's.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        fresh: list[tuple[torch.Tensor, torch.Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient, state = parameter.grad.clone(), self.state[parameter]
                if "hint" in state:
                    parameter.grad.mul_(2).sub_(state["hint"])
                    state["hint"].copy_(gradient)
                else:
                    fresh.append((parameter, gradient))
        result = super().step(closure)
        for (
            parameter,
            gradient,
        ) in fresh:  # only now: AdamW takes a parameter with any state for one it has seen
            self.state[parameter]["hint"] = gradient
        return result
