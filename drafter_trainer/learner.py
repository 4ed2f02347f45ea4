"""Updates of the drafter from packed traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from paceline.drafter_trainer.optimistic_adamw import OptimisticAdamW
from paceline.drafter_trainer.packing import DraftBatch, pack
from paceline.drafter_trainer.storage.optimizer_state import load_optimizer
from paceline.drafter_trainer.trace_buffer import Piece
from paceline.drafter_trainer.training_time_test import Interrupted, Objective, Unrolled, unrolled_loss
from paceline.rollout.drafters.eagle3_model import Eagle3Model


def first_non_finite(model: Eagle3Model) -> str | None:
    """The name of a parameter with NaN or infinite values; None where all are finite."""
    return next((name for name, p in model.named_parameters() if not bool(p.isfinite().all())), None)


class DrafterLearner:
    """Owns the trainable drafter and its optimizer.

    Args:
        model: float32 drafter.
        embed_tokens: The target's input embedding.
        head: The target's output head.
        objective: What to train for.
        lr: Of AdamW, whatever state is restored.
        optimistic: Whether updates reuse the last gradient as a hint (`OptimisticAdamW`).
        temperature: Of the rollouts.
        autocast: Context manager factory for mixed precision.
    """

    def __init__(
        self,
        model: Eagle3Model,
        embed_tokens: nn.Module,
        head: nn.Module,
        objective: Objective,
        *,
        lr: float,
        temperature: float,
        autocast: Callable[[], torch.autocast],
        optimistic: bool = False,
    ) -> None:
        self.model, self.objective = model, objective
        optimizer = OptimisticAdamW if optimistic else torch.optim.AdamW
        self.optimizer = optimizer(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
        self._lr = lr
        self._embed, self._head = embed_tokens, head
        self._temperature = temperature
        self._autocast = autocast

    def restore(self, stem: Path) -> None:
        """Loads the optimizer's moments.

        Raises:
            OptimizerStateError: truncated or missing files, or those of another optimizer.
        """
        load_optimizer(self.optimizer, stem)
        self.scale_rate(1.0)

    def start_over(self, weights: Eagle3Model) -> None:
        """Goes on from these weights, with an optimizer that has seen nothing."""
        self.model.load_state_dict(weights.state_dict())
        self.optimizer.state.clear()

    def scale_rate(self, multiple: float) -> None:
        """Learns at so many times its learning rate from now on."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * multiple

    def _pack(self, pieces: Sequence[Piece], weights: Sequence[float]) -> DraftBatch:
        device = self.model.fc.weight.device
        return pack(
            pieces,
            weights,
            self._head,
            self.model.vocabulary,
            self._temperature,
            self.objective.unroll,
            device,
        )

    def update(
        self, pieces: Sequence[Piece], weights: Sequence[float], stop: Callable[[], bool] | None = None
    ) -> Unrolled | None:
        """One optimizer step; None, and weights as they were, where the loss or its gradient is not finite.

        Args:
            pieces: Of traces.
            weights: How much each counts.
            stop: Asked all along; the update is broken off where it says so.

        Raises:
            Interrupted: where it was broken off.
        """

        def check() -> None:
            if stop is not None and stop():
                raise Interrupted

        with self._autocast():
            outcome = unrolled_loss(
                self.model, self._embed, self._pack(pieces, weights), self.objective, check
            )
        if not bool(torch.isfinite(outcome.loss)):
            return None
        self.optimizer.zero_grad(set_to_none=True)
        outcome.loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        if not bool(torch.isfinite(norm)):
            return None
        self.optimizer.step()
        return outcome

    @torch.no_grad()
    def evaluate(self, pieces: Sequence[Piece], model: Eagle3Model | None = None) -> Unrolled:
        """The present drafter, or ``model``, on pieces, each anchor alike."""
        with self._autocast():
            return unrolled_loss(
                model or self.model, self._embed, self._pack(pieces, [1.0] * len(pieces)), self.objective
            )
