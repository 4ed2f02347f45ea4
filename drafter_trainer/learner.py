"""Optimizer steps of the drafter on packed traces."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import nn

from paceline.drafter_trainer.objective.draft_objective import Interrupted, Objective, Unrolled
from paceline.drafter_trainer.objective.training_time_test import unrolled_loss
from paceline.drafter_trainer.optimistic_adamw import OptimisticAdamW
from paceline.drafter_trainer.packing import DraftBatch, pack
from paceline.drafter_trainer.storage.optimizer_state import load_optimizer
from paceline.drafter_trainer.teacher import Teacher
from paceline.drafter_trainer.trace_buffer import Piece
from paceline.rollout.drafters.eagle3_model import Eagle3Model


def first_non_finite(model: Eagle3Model) -> str | None:
    """Returns the name of a parameter with NaN or infinite values; None if all are finite."""
    return next((name for name, p in model.named_parameters() if not bool(p.isfinite().all())), None)


class DrafterLearner:
    """Owns the trainable drafter and its optimizer.

    Args:
        model: float32 drafter.
        embed_tokens: The target's input embedding.
        head: The target's output head.
        objective: Loss and its options.
        lr: AdamW's learning rate; it also replaces the one in a restored state.
        temperature: Sampling temperature of the rollouts.
        autocast: Factory of the context manager for mixed precision.
        context: Number of tokens before a piece that its anchors attend to.
        positions: Number of positions within which each piece is moved by a random distance, the first four
            tokens of its text aside (`pack`). None trains at the real positions.
        optimistic: Whether updates use the last gradient as a hint (`OptimisticAdamW`).
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
        context: int,
        positions: int | None = None,
        optimistic: bool = False,
    ) -> None:
        self.model, self.objective = model, objective
        optimizer = OptimisticAdamW if optimistic else torch.optim.AdamW
        self.optimizer = optimizer(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True)
        self._lr = lr
        self._embed, self._head = embed_tokens, head
        self._temperature, self.context, self._positions = temperature, context, positions
        self._autocast = autocast

    def restore(self, stem: Path) -> None:
        """Loads the optimizer's moments and keeps this learner's own learning rate.

        Args:
            stem: Path of the state's files, without suffix.

        Raises:
            OptimizerStateError: The files are missing, truncated, or those of another optimizer.
        """
        load_optimizer(self.optimizer, stem)
        self.scale_rate(1.0)

    def start_over(self, weights: Eagle3Model) -> None:
        """Copies the given weights into the model and clears the optimizer's state."""
        self.model.load_state_dict(weights.state_dict())
        self.optimizer.state.clear()

    def scale_rate(self, multiple: float) -> None:
        """Sets the learning rate to ``multiple`` times its configured value."""
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr * multiple

    def _pack(
        self, pieces: Sequence[Piece], weights: Sequence[float], offsets: Sequence[int] | None = None
    ) -> DraftBatch:
        device = self.model.fc.weight.device
        return pack(
            pieces,
            weights,
            Teacher(self._head, self.model.vocabulary, self._temperature),
            self.objective.positions,
            self.context,
            device,
            rejected=self.objective.on_policy > 0,
            offsets=offsets,
        )

    def _offsets(self, pieces: Sequence[Piece], draw: torch.Generator) -> list[int] | None:
        """Returns the random distance by which each piece is moved; None where none is."""
        if self._positions is None:
            return None
        room = [self._positions - piece.end - 1 - self.objective.positions for piece in pieces]
        return [int(torch.randint(max(n, 0) + 1, (), generator=draw)) for n in room]

    def _draw(self) -> torch.Generator:
        """Returns a generator seeded with the number of the update, so that a resumed run draws the same."""
        first = next(iter(self.optimizer.state.values()), {"step": 0})
        return torch.Generator().manual_seed(int(first["step"]))

    def update(
        self, pieces: Sequence[Piece], weights: Sequence[float], stop: Callable[[], bool] | None = None
    ) -> Unrolled | None:
        """Makes one optimizer step.

        Args:
            pieces: Pieces of traces that form the micro-batch.
            weights: Loss weight of each piece.
            stop: Called throughout the step; the step is interrupted once it returns True.

        Returns:
            Loss and acceptance statistics; None if the loss or its gradient is not finite, in which case the
            weights do not change.

        Raises:
            Interrupted: ``stop`` returned True; the weights have not changed.
        """

        def check() -> None:
            if stop is not None and stop():
                raise Interrupted

        with self._autocast():
            draw = self._draw()
            batch = self._pack(pieces, weights, self._offsets(pieces, draw))
            outcome = unrolled_loss(self.model, self._embed, batch, self.objective, check, draw)
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
        """Evaluates the current drafter, or ``model``, on pieces with equal weights."""
        with self._autocast():
            return unrolled_loss(
                model or self.model, self._embed, self._pack(pieces, [1.0] * len(pieces)), self.objective
            )
