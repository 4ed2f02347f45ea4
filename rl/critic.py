"""PPO's critic: what a completion is still worth before each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel

from drafter_trainer.optimizer_state import save_optimizer
from rl.algorithms.ppo import value_loss
from rl.config import CriticConfig
from rl.errors import UserError
from rl.log_probs import PACKED_ATTENTION
from rl.packed_step import packed_step
from rl.packing import PackedBatch
from rl.run_state import restore_optimizer
from rl.scoring import Completion, by_completion, micro_batches


class ValueModel(nn.Module):
    """A decoder with a linear head, which starts at zero: nothing is worth anything yet.

    Args:
        start: A causal LM; its decoder is taken over, its output head is not.
    """

    def __init__(self, start: PreTrainedModel) -> None:
        super().__init__()
        start.set_attn_implementation(PACKED_ATTENTION)
        self.decoder = start.base_model
        self.head = nn.Linear(start.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Values before each target: float32 [M]."""
        output = self.decoder(input_ids=batch.tokens[None], position_ids=batch.positions[None], use_cache=False, packed=batch)
        return self.head(output.last_hidden_state[0, batch.predict])[:, 0].float()


@dataclass(slots=True)
class CriticReport:
    """Sums over this rank's tokens.

    Attributes:
        tokens: How many.
        loss: Of the value loss.
        returns, squares, errors: Of the returns, their squares, and the squared errors before the update; for the share of the
            returns' variance that the critic explained.
    """

    tokens: int = 0
    loss: float = 0.0
    returns: float = 0.0
    squares: float = 0.0
    errors: float = 0.0


class Critic:
    """The value model and its optimizer.

    Args:
        accelerator: Of the run.
        model: Not yet wrapped.
        config: The recipe's critic section.
        budget: Tokens of a micro-batch.
    """

    def __init__(self, accelerator: Accelerator, model: ValueModel, config: CriticConfig, budget: int) -> None:
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
        self._accelerator, self._config, self._budget = accelerator, config, budget
        self._model, self._optimizer = accelerator.prepare(model, optimizer)

    def values(self, samples: Sequence[Completion]) -> list[torch.Tensor]:
        """float32 [L_i] for each sample, on the CPU."""
        chosen = [i for i, s in enumerate(samples) if s.completion]
        found = by_completion(self._accelerator.unwrap_model(self._model), samples, chosen, self._budget, self._accelerator)
        return [found[i].cpu() if i in found else torch.zeros(0) for i in range(len(samples))]

    def update(
        self,
        samples: Sequence[Completion],
        chosen: Sequence[int],
        values: Sequence[torch.Tensor],
        returns: Sequence[torch.Tensor],
        total_tokens: float,
    ) -> CriticReport:
        """One optimizer step. Collective.

        Args:
            samples: This rank's.
            chosen: Indices of those that count.
            values: float32 [L_i], from `values`.
            returns: float32 [L_i].
            total_tokens: Tokens that count, of all ranks.
        """
        report, device = CriticReport(), self._accelerator.device
        scale = self._accelerator.num_processes / max(total_tokens, 1.0)

        def loss_of(batch: PackedBatch) -> torch.Tensor:
            before = torch.cat([values[i] for i in batch.members]).to(device)
            wanted = torch.cat([returns[i] for i in batch.members]).to(device)
            with self._accelerator.autocast():
                now = self._model(batch)
            loss = value_loss(now, before, wanted, self._config.value_clip).sum()
            report.tokens += len(wanted)
            report.loss += float(loss.detach())
            report.returns += float(wanted.sum())
            report.squares += float(wanted.square().sum())
            report.errors += float((wanted - before).square().sum())
            return loss * scale

        self._model.train()
        batches = list(micro_batches(samples, chosen, self._budget, device))
        packed_step(
            self._accelerator,
            self._model,
            self._optimizer,
            batches,
            loss_of,
            lambda b: self._model(b).sum(),
            self._config.grad_clip,
        )
        return report

    def save(self, folder: Path) -> None:
        """Writes ``critic.safetensors`` and the optimizer's state; OSError and SafetensorError as they come."""
        state = self._accelerator.unwrap_model(self._model).state_dict()
        save_file({name: tensor.contiguous().cpu() for name, tensor in state.items()}, folder / "critic.safetensors")
        save_optimizer(self._optimizer, folder / "critic_optimizer")

    def restore(self, folder: Path) -> None:
        """Loads what `save` wrote.

        Raises:
            UserError: truncated or missing files.
        """
        path = folder / "critic.safetensors"
        try:
            self._accelerator.unwrap_model(self._model).load_state_dict(load_file(path))
        except (SafetensorError, OSError, RuntimeError) as error:
            reason = (str(error).splitlines() or ["no reason given"])[0]
            raise UserError(f"{path}: truncated, missing, or of another model ({reason}); resume from another checkpoint") from None
        restore_optimizer(self._optimizer, folder / "critic_optimizer")
