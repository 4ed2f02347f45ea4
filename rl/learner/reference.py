"""The policy that a run starts from: what its KL is measured to."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator

from paceline.rl.config.run import RunConfig
from paceline.rl.learner.log_probs import PolicyLogProbs
from paceline.rl.learner.microbatches import Completion, token_outputs
from paceline.rl.models.lora import without_adapters
from paceline.rl.models.policies import load_policy


class Reference:
    """A module of its own; where adapters are all that is trained and each rank has the whole policy, that
    without them.

    Args:
        config: The recipe.
        policy: What is trained; its own decoder.
        start: Directory of the policy that the run starts from.
        accelerator: Of the run.
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
        """float32 [L_i] for each sample, on the CPU. A rank needs no other for it."""
        chosen = [i for i, s in enumerate(samples) if len(s.completion)]
        budget, temperature = self._config.update.tokens_per_microbatch, self._config.rollout.temperature
        with without_adapters(self._module.policy) if self._adapted else nullcontext():
            found = token_outputs(
                lambda b: self._module(b, temperature)[0], samples, chosen, budget, self._accelerator
            )
        return [found[i].cpu() if i in found else torch.zeros(0) for i in range(len(samples))]
