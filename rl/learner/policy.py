"""Turns a step's rollouts and rewards into the policy's update: reference, advantages, critic, loss."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from paceline.rl.algorithms.advantages import (
    compute_kl_penalties,
    critic_advantages,
    token_advantages,
    uniform_groups,
)
from paceline.rl.algorithms.kl import KlCoefficient
from paceline.rl.config.run import RunConfig
from paceline.rl.errors import UserError
from paceline.rl.learner.balance import compute_cost, redistribute
from paceline.rl.learner.critic import Critic, CriticReport, ValueModel
from paceline.rl.learner.fused.fused_policy import UnsupportedPolicy
from paceline.rl.learner.log_probs import PolicyLogProbs
from paceline.rl.learner.moments import restore_moments
from paceline.rl.learner.reference import Reference
from paceline.rl.learner.updater import PolicyUpdater, UpdateReport
from paceline.rl.models.loading import load_policy, recompute_activations
from paceline.rl.models.lora import merged_weights
from paceline.rl.models.mergeable import adapted_layers
from paceline.rl.process.progress import Phase
from paceline.rl.rewards.shaping import Shaped
from paceline.rl.sharding import AdamWSettings, FullState, gather_full_state, shard
from paceline.rl.types import RankRollouts, TrainingSample
from paceline.rollout import FinishReason

_WRAPPED = "policy."  # where the policy lies in `PolicyLogProbs`


class PolicyLearner:
    """Trains the policy, and the critic where the recipe has one.

    Args:
        config: The recipe.
        policy: The whole policy, with equal weights on every rank; sharding may take it apart.
        start: Directory of the policy that the run starts from; the reference and the critic start from it.
        accelerator: The run's accelerator.
        checkpoint: Directory of the checkpoint to resume from, or None; the caller has loaded the policy's
            weights from it.

    Attributes:
        kl: The coefficient β of the KL penalty, which may adapt.
        critic: The critic, or None.
        reference: The reference policy, or None.
        entropy: Mean entropy of a token in the last update, over all ranks; None before the first.

    Raises:
        UserError: when the checkpoint is truncated, or the recipe's sharding mode is not available.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: PreTrainedModel,
        start: Path,
        accelerator: Accelerator,
        checkpoint: Path | None,
    ) -> None:
        self._config, self._accelerator = config, accelerator
        update = config.update
        if config.policy.gradient_checkpointing:
            recompute_activations(policy)
        text = policy.config.get_text_config()
        self._attention = text.hidden_size * text.num_hidden_layers / policy.num_parameters()
        module = PolicyLogProbs(policy, fuse=not config.scale.sharded)
        if config.rollout.match_trainer:
            _check_match(module, accelerator)
        self._adapted = None if config.scale.lora is None else adapted_layers(module)
        settings = AdamWSettings(
            update.lr, update.weight_decay, update.grad_clip, config.policy.mixed_precision
        )
        self._trained = shard(module, config.scale, accelerator, settings)
        self._updater = PolicyUpdater(
            accelerator,
            self._trained,
            update,
            config.rollout.temperature,
            config.rollout.max_tokens,
            config.steps,
        )
        self.entropy: float | None = None
        self.kl = KlCoefficient(update.kl_coef, update.kl_target)
        self.reference = Reference(config, module, start, accelerator) if update.kl_coef > 0 else None
        self.critic: Critic | None = None
        if update.advantage == "gae":
            decoder = load_policy(start, accelerator.device)
            if config.policy.gradient_checkpointing:
                recompute_activations(decoder)
            value_model = ValueModel(decoder).to(accelerator.device)
            self.critic = Critic(accelerator, value_model, config, checkpoint)
        if checkpoint is not None:
            restore_moments(self._trained, checkpoint / "optimizer")

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        """Yields the policy's whole weights by their names without adapters. Collective.

        They are valid until the next step.
        """
        for name, tensor in merged_weights(self._trained.full_weights, self._adapted):
            yield name.removeprefix(_WRAPPED), tensor

    def state(self) -> tuple[FullState, dict[str, torch.Tensor] | None]:
        """Returns what a checkpoint keeps of the policy, and its adapters' weights or None. Collective.

        The result is whole on the main rank and empty on others.
        """
        main = self._accelerator.is_main_process
        adapters = None
        if self._config.scale.lora is not None:
            weights = self._trained.full_weights(lambda name: ".lora_" in name)
            adapters = {name.removeprefix(_WRAPPED): tensor.cpu() for name, tensor in weights}
        return gather_full_state(self.weights(), self._trained, main), adapters

    def critic_state(self) -> FullState | None:
        """Returns what a checkpoint keeps of the critic, where the recipe has one. Collective."""
        return None if self.critic is None else self.critic.state()

    def samples(self, batch: RankRollouts) -> list[TrainingSample]:
        """Returns a rank's rollouts as samples without advantages, with the reference's log-probs if any.

        A rank that has finished early computes them while others decode. Not collective.
        """
        samples = []
        for r in batch.rollouts:
            prompt, completion = (
                torch.tensor(r.request.prompt_ids),
                torch.tensor(r.token_ids, dtype=torch.long),
            )
            samples.append(
                TrainingSample(prompt, completion, torch.tensor(r.logprobs), torch.zeros(len(completion)))
            )
        if self.reference is None:
            return samples
        return [
            replace(s, reference=logprobs)
            for s, logprobs in zip(samples, self.reference.logprobs(samples), strict=True)
        ]

    def learn(
        self,
        batch: RankRollouts,
        samples: list[TrainingSample],
        shaped: Shaped,
        step: int,
        shown: Phase | None = None,
    ) -> tuple[UpdateReport, CriticReport, list[float]]:
        """Updates policy and critic on a step's rollouts. Collective.

        Args:
            batch: This rank's rollouts.
            samples: The samples that `samples` returned for them.
            shaped: The shaped reward of each rollout.
            step: Index of the step.
            shown: Shows the progress of the policy's update.

        Returns:
            The policy's report, the critic's report, and the mean advantage of each completion.
        """
        config = self._config.update
        with_advantages = self._with_advantages(samples, shaped, batch.paths)
        masked = {FinishReason.FAILED, *([FinishReason.LENGTH] if config.mask_truncated else [])}
        size = self._config.rollout.group_size
        uniform = uniform_groups(shaped.rewards, size) if self._config.rollout.resample else set()
        counted = [
            with_advantages[i]
            for i, r in enumerate(batch.rollouts)
            if r.finish_reason not in masked and r.token_ids and i // size not in uniform
        ]
        counted += shaped.more
        kl_coef = self.kl.value if config.kl_in == "loss" else 0.0
        if self._config.scale.balance:
            moving = [self.critic is not None or self._updater.moves(s, kl_coef) for s in counted]
            costs = [
                compute_cost(s, self._attention) if m else 0.0 for s, m in zip(counted, moving, strict=True)
            ]
            counted = redistribute(counted, costs, self._accelerator)
        judged = CriticReport() if self.critic is None else self.critic.update(counted, self._tokens(counted))
        report = UpdateReport()
        if self.critic is None or step >= self._config.critic.warmup_steps:
            report = self._updater.run(counted, step, kl_coef, self.entropy, shown)
            kl, entropy, tokens = self._total(
                torch.tensor([report.kl, report.entropy, float(report.tokens)])
            ).tolist()
            self.kl.observe(kl / max(tokens, 1.0))
            self.entropy = entropy / tokens if tokens else self.entropy
        return (
            report,
            judged,
            [float(s.advantages.mean()) if len(s.advantages) else 0.0 for s in with_advantages],
        )

    def _with_advantages(
        self, samples: list[TrainingSample], shaped: Shaped, paths: list[tuple[int, ...]] | None
    ) -> list[TrainingSample]:
        config, rewards = self._config, shaped.rewards
        if shaped.tokens is not None:
            return [replace(s, advantages=a) for s, a in zip(samples, shaped.tokens, strict=True)]
        references = (
            None if self.reference is None else [s.reference for s in samples if s.reference is not None]
        )
        kl_penalties = compute_kl_penalties(
            config.update, self.kl.value, [s.logprobs for s in samples], references
        )
        if self.critic is None:
            advantages = token_advantages(
                config.update, config.rollout.group_size, rewards, kl_penalties, self._total, paths
            )
            if shaped.added is not None:
                advantages = [a + more for a, more in zip(advantages, shaped.added, strict=True)]
            return [replace(s, advantages=a) for s, a in zip(samples, advantages, strict=True)]
        values = self.critic.values(samples)
        advantages, returns = critic_advantages(config.critic, rewards, kl_penalties, values, self._total)
        columns = zip(samples, advantages, values, returns, strict=True)
        return [replace(s, advantages=a, values=v, returns=r) for s, a, v, r in columns]

    def _tokens(self, samples: list[TrainingSample]) -> float:
        """Returns the number of completion tokens on all ranks. Collective."""
        return float(self._total(torch.tensor(float(sum(len(s.completion) for s in samples)))))

    def _total(self, part: torch.Tensor) -> torch.Tensor:
        """Returns the sum over ranks, on the CPU. Collective."""
        summed: Any = self._accelerator.reduce(part.to(self._accelerator.device), "sum")
        return summed.cpu()


def _check_match(module: PolicyLogProbs, accelerator: Accelerator) -> None:
    """Checks that the policy is trained with the engine's arithmetic.

    Raises:
        UserError: It cannot be.
    """
    with accelerator.autocast():
        fused = module.fused
    if isinstance(fused, UnsupportedPolicy):
        raise UserError(
            f"rollout.match_trainer: {type(module.policy).__name__} cannot be trained with the engine's "
            f"arithmetic, because {fused}; write rollout.match_trainer: false"
        )
