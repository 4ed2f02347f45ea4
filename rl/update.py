"""The policy update: GRPO over packed micro-batches, with one gradient exchange an optimizer step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import nn

from rl.algorithms.grpo import grpo_loss
from rl.config import UpdateConfig
from rl.packing import PackedBatch, PromptRow, Sample, pack, plan


@dataclass(frozen=True, slots=True)
class Scored:
    """A rollout with its advantage.

    Attributes:
        prompt, completion: Token ids.
        logprobs: The engine's, one a token.
        advantage: Of the whole completion.
        group: Samples with one group share their prompt.
    """

    prompt: Sequence[int]
    completion: Sequence[int]
    logprobs: Sequence[float]
    advantage: float
    group: str


@dataclass(slots=True)
class UpdateReport:
    """Sums over this rank's tokens that entered the loss; ``grad_norm`` and ``skipped`` are of the whole update."""

    tokens: int = 0
    loss: float = 0.0
    entropy: float = 0.0
    clipped: float = 0.0
    kl: float = 0.0
    engine_gap: float = 0.0
    engine_gap_max: float = 0.0
    grad_norm: float = 0.0
    skipped: int = 0


class PolicyUpdater:
    """Runs the optimizer steps of one batch of rollouts.

    Args:
        accelerator: Of the run.
        model: The wrapped `PolicyLogProbs`.
        optimizer: Its wrapped optimizer.
        config: The recipe's update section.
        temperature: Of the rollouts.
        reference: A frozen `PolicyLogProbs`, when a KL penalty is wanted.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: UpdateConfig,
        temperature: float,
        reference: nn.Module | None,
    ) -> None:
        self._accelerator, self._model, self._optimizer = accelerator, model, optimizer
        self._config, self._temperature, self._reference = config, temperature, reference

    def run(self, samples: Sequence[Scored], step: int) -> UpdateReport:
        """One pass over this rank's samples in ``minibatches`` optimizer steps."""
        report = UpdateReport()
        self._model.train()
        for group in self._optimizer.param_groups:
            group["lr"] = self._config.lr * min((step + 1) / max(self._config.lr_warmup_steps, 1), 1.0)
        parts = [range(i, len(samples), self._config.minibatches) for i in range(self._config.minibatches)]
        if self._config.minibatches == 1:
            self._optimizer_step(samples, list(parts[0]), {}, report)
            return report
        old = self._old_logprobs(samples)
        for part in parts:
            self._optimizer_step(samples, list(part), old, report)
        return report

    def _rows(self, samples: Sequence[Scored], chosen: Sequence[int]) -> list[PromptRow]:
        """Samples that can have a gradient, by prompt. Without a KL term a zero advantage has none: it is not computed at all,
        though its tokens count in the normalisation."""
        groups: dict[str, list[int]] = {}
        for i in chosen:
            if samples[i].advantage != 0 or self._config.kl_coef > 0:
                groups.setdefault(samples[i].group, []).append(i)
        return [
            PromptRow(samples[members[0]].prompt, tuple(Sample(i, samples[i].completion) for i in members))
            for members in groups.values()
        ]

    def _batches(self, rows: Sequence[PromptRow]) -> Iterator[PackedBatch]:
        for part in plan(rows, self._config.tokens_per_microbatch):
            yield pack(part).to(self._accelerator.device)

    @torch.no_grad()
    def _old_logprobs(self, samples: Sequence[Scored]) -> dict[int, torch.Tensor]:
        """Log-probs before the first optimizer step, by sample."""
        old: dict[int, torch.Tensor] = {}
        for batch in self._batches(self._rows(samples, range(len(samples)))):
            with self._accelerator.autocast():
                logprobs, _ = self._accelerator.unwrap_model(self._model)(batch, self._temperature)
            for order, index in enumerate(batch.members):
                old[index] = logprobs[batch.owner == order]
        return old

    def _optimizer_step(
        self, samples: Sequence[Scored], chosen: Sequence[int], old: dict[int, torch.Tensor], report: UpdateReport
    ) -> None:
        local_tokens = torch.tensor(float(sum(len(samples[i].completion) for i in chosen)), device=self._accelerator.device)
        total_tokens = float(self._accelerator.reduce(local_tokens, "sum"))
        batches = list(self._batches(self._rows(samples, chosen)))
        if not batches:  # this rank still takes part in the gradient exchange
            batches = [pack([PromptRow([0], (Sample(-1, [0]),))]).to(self._accelerator.device)]
        scale = self._accelerator.num_processes / max(total_tokens, 1.0)
        for number, batch in enumerate(batches):
            with self._synchronised(number == len(batches) - 1):
                loss = self._loss(samples, batch, old, report)
                self._accelerator.backward(loss * scale)
        norm = self._accelerator.clip_grad_norm_(self._model.parameters(), self._config.grad_clip)
        report.grad_norm = float(norm)
        if torch.isfinite(torch.as_tensor(report.grad_norm)):
            self._optimizer.step()
        else:
            report.skipped += 1
        # Kept, not dropped: the gradients are views of DDP's buckets, and fresh ones beside those would be a second copy.
        self._optimizer.zero_grad(set_to_none=False)

    def _synchronised(self, last: bool) -> AbstractContextManager[None]:
        return nullcontext() if last else self._accelerator.no_sync(self._model)

    def _loss(
        self, samples: Sequence[Scored], batch: PackedBatch, old: dict[int, torch.Tensor], report: UpdateReport
    ) -> torch.Tensor:
        with self._accelerator.autocast():
            logprobs, entropy = self._model(batch, self._temperature)
        if batch.members == (-1,):
            return logprobs.sum() * 0.0
        device = logprobs.device
        advantages = torch.tensor([samples[i].advantage for i in batch.members], device=device)[batch.owner]
        before = torch.cat([old[i] for i in batch.members]) if old else logprobs.detach()
        token_loss = grpo_loss(
            logprobs,
            before,
            advantages,
            clip_low=self._config.clip_low,
            clip_high=self._config.clip_high,
            reference_logprobs=self._reference_logprobs(batch),
            kl_coef=self._config.kl_coef,
        )
        behaviour = torch.tensor([x for i in batch.members for x in samples[i].logprobs], device=device)
        gap = (behaviour - logprobs.detach()).abs()
        report.tokens += len(gap)
        report.loss += float(token_loss.loss.detach().sum())
        report.entropy += float(entropy.sum())
        report.clipped += float(token_loss.clipped.sum())
        report.kl += float(token_loss.kl.sum())
        report.engine_gap += float(gap.sum())
        report.engine_gap_max = max(report.engine_gap_max, float(gap.max()))
        return token_loss.loss.sum()

    @torch.no_grad()
    def _reference_logprobs(self, batch: PackedBatch) -> torch.Tensor | None:
        if self._reference is None:
            return None
        with self._accelerator.autocast():
            return self._reference(batch, self._temperature)[0]
