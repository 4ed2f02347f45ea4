"""PPO's critic: estimates the return of a completion before each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from paceline.rl.algorithms.ppo import value_loss
from paceline.rl.config.run import RunConfig
from paceline.rl.errors import UserError
from paceline.rl.learner.microbatches import Completion, packed_microbatches, packed_step, token_outputs
from paceline.rl.learner.moments import restore_moments
from paceline.rl.learner.packed_attention import PACKED_ATTENTION
from paceline.rl.learner.packing import PackedBatch
from paceline.rl.learner.packing_check import decoder_of, turn_off_dropout
from paceline.rl.process.process_tuning import without_slow_bfloat16
from paceline.rl.sharding import AdamWSettings, FullState, gather_full_state, shard
from paceline.rl.types import TrainingSample
from paceline.rollout.transformers_api import use_attention


class ValueModel(nn.Module):
    """A decoder with a linear value head, whose weights start at zero.

    Args:
        start: A causal LM, whose decoder is used; its output head is not.
    """

    def __init__(self, start: PreTrainedModel) -> None:
        super().__init__()
        turn_off_dropout(start)
        use_attention(start, PACKED_ATTENTION)
        self.decoder = decoder_of(start)
        self.head = nn.Linear(start.config.get_text_config().hidden_size, 1)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        """Returns the value before each target, float32 [M]."""
        with without_slow_bfloat16(batch.tokens.device):
            output = self.decoder(
                input_ids=batch.tokens[None],
                position_ids=batch.positions[None],
                use_cache=False,
                packed=batch,
            )
            return self.head(output.last_hidden_state[0, batch.predict])[:, 0].float()


@dataclass(slots=True)
class CriticReport:
    """Sums over this rank's tokens, from which the critic's explained variance follows.

    Attributes:
        tokens: The number of tokens.
        loss: Sum of the value loss.
        returns: Sum of the returns.
        squares: Sum of the squared returns.
        errors: Sum of the squared errors before the update.
    """

    tokens: int = 0
    loss: float = 0.0
    returns: float = 0.0
    squares: float = 0.0
    errors: float = 0.0


class Critic:
    """Trains the value model and computes its values.

    Args:
        accelerator: The run's accelerator.
        model: The value model, not yet wrapped.
        config: The recipe.
        kept: Directory of the checkpoint to resume from, or None.

    Raises:
        UserError: when the checkpoint's files are truncated or missing.
    """

    def __init__(
        self, accelerator: Accelerator, model: ValueModel, config: RunConfig, kept: Path | None
    ) -> None:
        self._accelerator, self._config, self._budget = (
            accelerator,
            config.critic,
            config.update.tokens_per_microbatch,
        )
        if kept is not None:
            _load(model, kept / "critic.safetensors")
        settings = AdamWSettings(
            config.critic.lr, 0.0, config.critic.grad_clip, config.policy.mixed_precision
        )
        self._trained = shard(model, config.scale, accelerator, settings)
        if kept is not None:
            restore_moments(self._trained, kept / "critic_optimizer")

    def values(self, samples: Sequence[Completion]) -> list[torch.Tensor]:
        """Returns the values of each completion, float32 [L_i], on the CPU. Collective."""
        chosen = [i for i, s in enumerate(samples) if len(s.completion)]
        computed = token_outputs(
            self._trained.unwrapped, samples, chosen, self._budget, self._accelerator, self._trained
        )
        return [computed[i].cpu() if i in computed else torch.zeros(0) for i in range(len(samples))]

    def update(self, samples: Sequence[TrainingSample], total_tokens: float) -> CriticReport:
        """Takes one optimizer step. Collective.

        Args:
            samples: This rank's samples, with their values and returns.
            total_tokens: The number of completion tokens on all ranks.
        """
        report, device = CriticReport(), self._accelerator.device
        scale = self._accelerator.num_processes / max(total_tokens, 1.0)

        def loss_of(batch: PackedBatch) -> torch.Tensor:
            members = [samples[i] for i in batch.members]
            before = torch.cat([s.values for s in members if s.values is not None]).to(device)
            wanted = torch.cat([s.returns for s in members if s.returns is not None]).to(device)
            with self._accelerator.autocast():
                now = self._trained.module(batch)
            loss = value_loss(now, before, wanted, self._config.value_clip).sum()
            report.tokens += len(wanted)
            report.loss += float(loss.detach())
            report.returns += float(wanted.sum())
            report.squares += float(wanted.square().sum())
            report.errors += float((wanted - before).square().sum())
            return loss * scale

        model = self._trained.module.train()
        batches = list(packed_microbatches(samples, range(len(samples)), self._budget, device))
        packed_step(self._accelerator, self._trained, batches, loss_of, lambda batch: model(batch).sum())
        return report

    def state(self) -> FullState:
        """Returns what a checkpoint keeps: whole on the main rank, empty on others. Collective."""
        weights = self._trained.full_weights(lambda name: True)
        return gather_full_state(weights, self._trained, self._accelerator.is_main_process)


def _load(model: ValueModel, path: Path) -> None:
    try:
        model.load_state_dict(load_file(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        reason = (str(error).splitlines() or ["no reason given"])[0]
        raise UserError(
            f"{path}: truncated, missing, or of another model ({reason}); resume from another checkpoint"
        ) from None
