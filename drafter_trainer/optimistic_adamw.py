"""AdamW that also takes the step that it expects next."""

from __future__ import annotations

from collections.abc import Callable

import torch


class OptimisticAdamW(torch.optim.AdamW):
    """AdamW whose weights are one predicted step ahead: they move by 2 d_t − d_{t−1}, with AdamW's steps d_t.

    This is optimistic online learning as OnlineSpec applies it to drafters (Qian et al., "When Drafts
    Evolve", arXiv 2603.12617): weights ŵ_t = ŵ_{t−1} + d_t follow the gradients, and the model that drafts,
    and at which the next gradient is taken, is ŵ_t + d_t, because the last step is the hint for the next one.
    The hint enters the weights only, so that Adam's moments are those of the gradients themselves (Optimistic
    Adam: Daskalakis et al., "Training GANs with Optimism", arXiv 1711.00141, algorithm 1).
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Makes one optimizer step; see `torch.optim.AdamW.step`."""
        parameters = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        before = [p.clone() for p in parameters]
        result = super().step(closure)
        for parameter, old in zip(parameters, before, strict=True):
            taken, state = parameter - old, self.state[parameter]
            parameter.add_(taken)
            if "hint" in state:
                parameter.sub_(state["hint"])
            state["hint"] = taken
        return result
