"""From a step's rollouts and rewards to the policy's update: reference, advantages, critic, loss."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from rl.advantages import critic_advantages, penalties, token_advantages, uniform_groups
from rl.algorithms.kl import KlCoefficient
from rl.config import RunConfig
from rl.critic import Critic, CriticReport, ValueModel
from rl.log_probs import PolicyLogProbs
from rl.policies import load_policy
from rl.rollouts import RankRollouts
from rl.run_state import Checkpoint, restore_optimizer
from rl.scoring import by_completion
from rl.update import PolicyUpdater, Scored, UpdateReport
from rollout import FinishReason


class PolicyLearner:
    """Owns what is trained beside the drafter: the policy's optimizer, and the critic where the recipe has one.

    Args:
        config: The recipe.
        policy: The trainer's unwrapped module.
        start: Directory of the policy that the run starts from: the reference, and the critic's decoder.
        accelerator: Of this process.

    Attributes:
        optimizer: The policy's.
        kl: β, which may be adapted.
    """

    def __init__(self, config: RunConfig, policy: PreTrainedModel, start: Path, accelerator: Accelerator) -> None:
        self._config, self._accelerator = config, accelerator
        update = config.update
        if config.policy.gradient_checkpointing:
            policy.activation_checkpointing_enable()
        module = PolicyLogProbs(policy)
        optimizer = torch.optim.AdamW(module.parameters(), lr=update.lr, weight_decay=update.weight_decay, fused=True)
        model, self.optimizer = accelerator.prepare(module, optimizer)
        self._updater = PolicyUpdater(
            accelerator, model, self.optimizer, update, config.rollout.temperature, config.rollout.max_tokens, config.steps
        )
        self.kl = KlCoefficient(update.kl_coef, update.kl_target)
        self._reference: PolicyLogProbs | None = None
        if update.kl_coef > 0:
            self._reference = PolicyLogProbs(load_policy(start, accelerator.device)).requires_grad_(False).eval()
        self.critic: Critic | None = None
        if update.advantage == "gae":
            decoder = load_policy(start, accelerator.device)
            if config.policy.gradient_checkpointing:
                decoder.activation_checkpointing_enable()
            value_model = ValueModel(decoder).to(accelerator.device)
            self.critic = Critic(accelerator, value_model, config.critic, update.tokens_per_microbatch)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Goes on from a checkpoint; the policy's weights are the caller's.

        Raises:
            UserError: truncated or missing files.
        """
        restore_optimizer(self.optimizer, checkpoint.path / "optimizer")
        if self.critic is not None:
            self.critic.restore(checkpoint.path)
        self.kl.value = float(checkpoint.state.get("kl_coef", self.kl.value))

    def learn(self, done: RankRollouts, rewards: list[float], step: int) -> tuple[UpdateReport, CriticReport, list[float]]:
        """Updates on a step's rollouts. Collective.

        Returns:
            The policy's report, the critic's, and the mean advantage of each completion.
        """
        config = self._config.update
        bare = [
            Scored(r.request.prompt_ids, r.token_ids, torch.tensor(r.logprobs), torch.zeros(len(r.token_ids)), problem.key)
            for r, problem in zip(done.rollouts, done.problems, strict=True)
        ]
        masked = {FinishReason.FAILED, *([FinishReason.LENGTH] if config.mask_truncated else [])}
        silent = uniform_groups(rewards, self._config.rollout.group_size) if self._config.rollout.resample else set()
        counted = [
            i
            for i, r in enumerate(done.rollouts)
            if r.finish_reason not in masked and r.token_ids and i // self._config.rollout.group_size not in silent
        ]
        reference = self._reference_logprobs(bare)
        taken = penalties(config, self.kl.value, [s.logprobs for s in bare], reference)
        advantages, judged = self._advantages(bare, counted, rewards, taken)
        report = UpdateReport()
        if self.critic is None or step >= self._config.critic.warmup_steps:
            samples = [
                replace(bare[i], advantages=advantages[i], reference=None if reference is None else reference[i]) for i in counted
            ]
            report = self._updater.run(samples, step, self.kl.value if config.kl_in == "loss" else 0.0)
            kl, tokens = self._total(torch.tensor([report.kl, float(report.tokens)])).tolist()
            self.kl.observe(kl / max(tokens, 1.0))
        return report, judged, [float(a.mean()) if len(a) else 0.0 for a in advantages]

    def _advantages(
        self, samples: list[Scored], counted: list[int], rewards: list[float], taken: list[torch.Tensor]
    ) -> tuple[list[torch.Tensor], CriticReport]:
        config = self._config
        if self.critic is None:
            return token_advantages(config.update, config.rollout.group_size, rewards, taken, self._total), CriticReport()
        values = self.critic.values(samples)
        advantages, returns = critic_advantages(config.critic, rewards, taken, values, self._total)
        tokens = float(self._total(torch.tensor(float(sum(len(values[i]) for i in counted)))))
        return advantages, self.critic.update(samples, counted, values, returns, tokens)

    def _reference_logprobs(self, samples: list[Scored]) -> list[torch.Tensor] | None:
        reference = self._reference
        if reference is None:
            return None
        chosen = [i for i, s in enumerate(samples) if s.completion]
        budget, temperature = self._config.update.tokens_per_microbatch, self._config.rollout.temperature
        found = by_completion(lambda b: reference(b, temperature)[0], samples, chosen, budget, self._accelerator)
        return [found[i].cpu() if i in found else torch.zeros(0) for i in range(len(samples))]

    def _total(self, part: torch.Tensor) -> torch.Tensor:
        """The sum over ranks."""
        summed: Any = self._accelerator.reduce(part.to(self._accelerator.device), "sum")
        return summed.cpu()
