"""Online updates of the drafter from the engine's traces."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from drafter_trainer.buffer import TraceBuffer
from drafter_trainer.unroll import make_batch, unrolled_loss
from rollout.drafters.eagle3_model import Eagle3Model


@dataclass(slots=True)
class LearnerReport:
    """One call of `DrafterLearner.train`.

    Attributes:
        updates: Optimizer steps.
        tokens: Trace tokens seen.
        loss: Mean loss.
        acceptance: Expected acceptance Σ min(p, q) at each draft position.
        seconds: Wall time.
        skipped: Micro-batches left out because their loss was not finite.
    """

    updates: int = 0
    tokens: int = 0
    loss: float = 0.0
    acceptance: list[float] = field(default_factory=list)
    seconds: float = 0.0
    skipped: int = 0


class DrafterLearner:
    """Owns the trainable drafter and its optimizer.

    Args:
        model: float32 drafter.
        embed_tokens: The target's input embedding.
        head: The target's output head.
        lr: AdamW's learning rate.
        temperature: Of the rollouts.
        unroll: Draft positions trained on.
        decay: Weight of each position relative to the one before.
        autocast: Context manager factory for mixed precision.
    """

    def __init__(
        self,
        model: Eagle3Model,
        embed_tokens: nn.Module,
        head: nn.Module,
        *,
        lr: float,
        temperature: float,
        unroll: int,
        decay: float,
        autocast: Callable[[], torch.autocast],
    ) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        self._embed, self._head = embed_tokens, head
        self._temperature, self._unroll, self._decay = temperature, unroll, decay
        self._autocast = autocast

    def train(self, buffer: TraceBuffer, *, budget: int, passes: int, seed: int) -> LearnerReport:
        """Passes over the buffer's current step.

        Args:
            buffer: Traces.
            budget: Tokens of one update.
            passes: Passes over the traces.
            seed: Of the order.
        """
        report = LearnerReport()
        started = time.perf_counter()
        for number in range(passes):
            for traces in buffer.batches(budget, seed + number):
                loss, acceptance = self._update(traces)
                if acceptance is None:
                    report.skipped += 1
                    continue
                report.updates += 1
                report.tokens += sum(len(t.token_ids) for t in traces)
                report.loss += loss
                report.acceptance = [a + b for a, b in zip(report.acceptance or [0.0] * len(acceptance), acceptance, strict=True)]
        count = max(report.updates, 1)
        report.loss /= count
        report.acceptance = [a / count for a in report.acceptance]
        report.seconds = time.perf_counter() - started
        return report

    def _update(self, traces: list) -> tuple[float, list[float] | None]:
        with self._autocast():
            batch = make_batch(traces, self._head, self.model.vocabulary, self._temperature, self._unroll)
            loss, acceptance = unrolled_loss(self.model, self._embed, batch, self._unroll, self._decay)
        if not bool(torch.isfinite(loss)):
            return float("nan"), None
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not bool(torch.isfinite(norm)):
            return float("nan"), None
        self.optimizer.step()
        return float(loss.detach()), acceptance
