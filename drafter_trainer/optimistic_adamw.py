"""AdamW that steps on a prediction of the next gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch


class OptimisticAdamW(torch.optim.AdamW):
    """AdamW on 2 g_t − g_{t−1}: the change between the last two gradients predicts the next one.

    This is optimistic online learning as OnlineSpec applies it to drafters (Qian et al., "When Drafts
    Evolve", arXiv 2603.12617). Where the policy moves slowly, consecutive gradients are similar, and g_t plus
    its last change is a better prediction of the next gradient than g_t alone. The first step has no previous
    gradient and is plain AdamW.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Makes one optimizer step; see `torch.optim.AdamW.step`."""
        unseen: list[tuple[torch.Tensor, torch.Tensor]] = []
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                gradient, state = parameter.grad.clone(), self.state[parameter]
                if "hint" in state:
                    parameter.grad.mul_(2).sub_(state["hint"])
                    state["hint"].copy_(gradient)
                else:
                    unseen.append((parameter, gradient))
        result = super().step(closure)
        # Only now: AdamW initializes its moments only for parameters whose state is empty.
        for parameter, gradient in unseen:
            self.state[parameter]["hint"] = gradient
        return result
