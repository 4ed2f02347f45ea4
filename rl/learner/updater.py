"""Updates the policy: packed micro-batches, with one gradient exchange per optimizer step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from paceline.rl.algorithms.grpo import mastered_tokens, token_weights, weight_total
from paceline.rl.algorithms.importance import importance_weights
from paceline.rl.algorithms.kl import estimate_kl
from paceline.rl.algorithms.lr_schedule import rate_at
from paceline.rl.algorithms.policy_losses import POLICY_LOSSES
from paceline.rl.config.update import UpdateConfig
from paceline.rl.learner.microbatches import packed_microbatches, packed_step, token_outputs
from paceline.rl.learner.packing import PackedBatch
from paceline.rl.process.progress import Phase
from paceline.rl.sharding import TrainedModule
from paceline.rl.types import TrainingSample


@dataclass(slots=True)
class UpdateReport:
    """Sums over this rank's tokens that entered the loss.

    Attributes:
        tokens: The number of tokens.
        loss: Sum of the loss.
        entropy: Sum of the entropies, in nats.
        clipped: The number of tokens whose ratio was clipped.
        kl: Sum of the k3 estimates of the KL divergence to the reference.
        engine_gap: Sum of |log π_trainer − log π_engine| at the parameters that both had.
        engine_gap_max: The largest of these.
        weights: Sum of π_trainer / π_engine, truncated at the recipe's cap.
        weights_squared: Sum of their squares.
        truncated: The number of truncated weights.
        mastered: The number of tokens that were left out of the loss as well mastered.
        grad_norm: The gradient's norm in the last optimizer step, before clipping.
        skipped: The number of optimizer steps that were skipped because the gradient was not finite.
    """

    tokens: int = 0
    loss: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    kl: float = 0.0
    engine_gap: float = 0.0
    engine_gap_max: float = 0.0
    weights: float = 0.0
    weights_squared: float = 0.0
    truncated: float = 0.0
    mastered: int = 0
    grad_norm: float = 0.0
    skipped: int = 0


class PolicyUpdater:
    """Runs the optimizer steps of one batch of rollouts.

    Args:
        accelerator: The run's accelerator.
        trained: The wrapped `PolicyLogProbs` with its optimizer.
        config: The recipe's update section.
        temperature: Sampling temperature of the rollouts.
        longest: The largest number of tokens of a completion.
        steps: The number of steps of the run.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        trained: TrainedModule,
        config: UpdateConfig,
        temperature: float,
        longest: int,
        steps: int,
    ) -> None:
        self._accelerator, self._trained = accelerator, trained
        self._config, self._temperature, self._longest, self._steps = config, temperature, longest, steps
        self._masking = False
        self._shown: Phase | None = None
        self._tokens = 0

    def run(
        self,
        samples: Sequence[TrainingSample],
        step: int,
        kl_coef: float = 0.0,
        entropy: float | None = None,
        shown: Phase | None = None,
    ) -> UpdateReport:
        """Trains once on each of this rank's samples, in ``minibatches`` optimizer steps. Collective.

        Args:
            samples: This rank's samples. With none, the rank only takes part in the gradient exchange.
            step: Index of the step, which decides the learning rate.
            kl_coef: Coefficient β of the KL penalty in the loss.
            entropy: Mean entropy of a token in the previous update, over all ranks; None before the first.
            shown: Shows how many tokens are computed.
        """
        report, self._shown = UpdateReport(), shown
        self._tokens = sum(len(s.completion) for s in samples if self.moves(s, kl_coef))
        self._masking = (
            self._config.mask_mastered is not None
            and entropy is not None
            and entropy < self._config.mastered_below
        )
        self._trained.module.train()
        rate = rate_at(step, self._steps, self._config.lr_warmup_steps, self._config.schedule)
        self._trained.set_rate(self._config.lr * rate)
        parts = [
            list(range(i, len(samples), self._config.minibatches)) for i in range(self._config.minibatches)
        ]
        old = self._old_logprobs(samples, kl_coef) if len(parts) > 1 else {}
        for part in parts:
            self._optimizer_step(samples, part, old, kl_coef, report)
        return report

    def moves(self, sample: TrainingSample, kl_coef: float) -> bool:
        """Whether a sample can have a gradient.

        Without a KL penalty or entropy bonus, a sample whose advantages are all zero has none. It is not
        computed, but its tokens count in the normalisation.
        """
        return kl_coef > 0 or self._config.entropy_coef != 0 or bool(sample.advantages.any())

    def _old_logprobs(self, samples: Sequence[TrainingSample], kl_coef: float) -> dict[int, torch.Tensor]:
        """Returns log-probs before the first optimizer step, for samples that can have a gradient."""
        trained, moving = self._trained, [i for i, s in enumerate(samples) if self.moves(s, kl_coef)]
        budget = self._config.tokens_per_microbatch
        return token_outputs(
            lambda b: trained.unwrapped(b, self._temperature)[0],
            samples,
            moving,
            budget,
            self._accelerator,
            trained,
        )

    def _optimizer_step(
        self,
        samples: Sequence[TrainingSample],
        chosen: Sequence[int],
        old: dict[int, torch.Tensor],
        kl_coef: float,
        report: UpdateReport,
    ) -> None:
        device = self._accelerator.device
        lengths = torch.tensor([len(samples[i].completion) for i in chosen])
        total = float(
            self._accelerator.reduce(
                torch.tensor(weight_total(lengths, self._config.aggregate), device=device), "sum"
            )
        )
        weights = dict(
            zip(chosen, token_weights(lengths, self._config.aggregate, self._longest).tolist(), strict=True)
        )
        moving = [i for i in chosen if self.moves(samples[i], kl_coef)]
        scale = self._accelerator.num_processes / max(total, 1.0)
        report.grad_norm = packed_step(
            self._accelerator,
            self._trained,
            list(packed_microbatches(samples, moving, self._config.tokens_per_microbatch, device)),
            lambda batch: self._loss(samples, batch, old, weights, kl_coef, report) * scale,
            lambda batch: self._trained.module(batch, self._temperature)[0].sum(),
        )
        report.skipped += not math.isfinite(report.grad_norm)

    def _loss(
        self,
        samples: Sequence[TrainingSample],
        batch: PackedBatch,
        old: dict[int, torch.Tensor],
        weights: dict[int, float],
        kl_coef: float,
        report: UpdateReport,
    ) -> torch.Tensor:
        config = self._config
        with self._accelerator.autocast():
            logprobs, entropy = self._trained.module(batch, self._temperature, config.entropy_coef != 0)
        device = logprobs.device
        members = [samples[i] for i in batch.members]
        before = torch.cat([old[i] for i in batch.members]) if old else logprobs.detach()
        engine = torch.cat([s.logprobs for s in members]).to(device)
        advantages = torch.cat([s.advantages for s in members]).to(device)
        surrogate = POLICY_LOSSES[config.ratio](
            logprobs,
            before,
            advantages,
            owner=batch.owner,
            clip_low=config.clip_low,
            clip_high=config.clip_high,
        )
        importance = importance_weights(before, engine, batch.owner, config.importance, config.importance_cap)
        counted = surrogate.loss * importance
        if self._masking and config.mask_mastered is not None:
            mastered = mastered_tokens(before, advantages, config.mask_mastered)
            counted = counted.masked_fill(mastered, 0.0)
            report.mastered += int(mastered.sum())
        loss = counted - config.entropy_coef * entropy
        if members[0].reference is not None:
            reference = torch.cat([s.reference for s in members if s.reference is not None]).to(device)
            report.kl += float(estimate_kl(logprobs.detach(), reference, "k3").sum())
            if kl_coef > 0:
                loss = loss + kl_coef * estimate_kl(logprobs, reference, config.kl)
        self._note(report, loss, entropy, surrogate.clipped, before, engine)
        return (loss * torch.tensor([weights[i] for i in batch.members], device=device)[batch.owner]).sum()

    def _note(
        self,
        report: UpdateReport,
        loss: torch.Tensor,
        entropy: torch.Tensor,
        clipped: torch.Tensor,
        before: torch.Tensor,
        engine: torch.Tensor,
    ) -> None:
        gap = (engine - before).abs()
        ratio = torch.exp(before - engine)
        kept = ratio.clamp(max=self._config.importance_cap)
        report.tokens += len(gap)
        if self._shown is not None:
            self._shown.update(report.tokens, total=self._tokens, unit="tokens")
        report.loss += float(loss.detach().sum())
        report.entropy += float(entropy.detach().sum())
        report.clipped += float(clipped.sum())
        report.engine_gap += float(gap.sum())
        report.engine_gap_max = max(report.engine_gap_max, float(gap.max()))
        report.weights += float(kept.sum())
        report.weights_squared += float(kept.square().sum())
        report.truncated += float((ratio > self._config.importance_cap).sum())
