"""The reference policy of the KL penalty: the policy that a run starts from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator

from paceline.rl.config.run import RunConfig
from paceline.rl.learner.log_probs import PolicyLogProbs
from paceline.rl.learner.microbatches import Completion, token_outputs
from paceline.rl.models.loading import load_policy
from paceline.rl.models.lora import without_adapters


class Reference:
    """Computes log-probs of the reference policy.

    The reference is a module of its own. Where only adapters are trained and each rank holds the whole
    policy, it is the policy without its adapters.

    Args:
        config: The recipe.
        policy: The trained module, unwrapped.
        start: Directory of the policy that the run starts from.
        accelerator: The run's accelerator.
    """

    def __init__(
        self, config: RunConfig, policy: PolicyLogProbs, start: Path, accelerator: Accelerator
    ) -> None:
        self._config, self._accelerator = config, accelerator
        self._adapted = config.scale.lora is not None and not config.scale.sharded
        self._module = (
            policy
            if self._adapted
            else PolicyLogProbs(load_policy(start, accelerator.device)).requires_grad_(False).eval()
        )

    def logprobs(self, samples: Sequence[Completion]) -> list[torch.Tensor]:
        """Returns the log-probs of each completion, float32 [L_i], on the CPU. Not collective."""
        chosen = [i for i, s in enumerate(samples) if len(s.completion)]
        budget, temperature = self._config.update.tokens_per_microbatch, self._config.rollout.temperature
        with without_adapters(self._module.policy) if self._adapted else nullcontext():
            computed = token_outputs(
                lambda b: self._module(b, temperature)[0], samples, chosen, budget, self._accelerator
            )
        return [computed[i].cpu() if i in computed else torch.zeros(0) for i in range(len(samples))]
