"""Computes per-token log-probs of packed batches without padding and without materializing all logits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from paceline.rl.errors import UserError
from paceline.rl.learner.fused.fused_policy import FusedPolicy, UnsupportedPolicy
from paceline.rl.learner.packed_attention import PACKED_ATTENTION
from paceline.rl.learner.packing import PackedBatch
from paceline.rl.learner.packing_check import check_head, check_packing, decoder_of, turn_off_dropout
from paceline.rl.memory.activations import head_rows
from paceline.rl.process.process_tuning import without_slow_bfloat16
from paceline.rollout.model.shape import check_family
from paceline.rollout.text_limits import text_limit
from paceline.rollout.transformers_api import use_attention

_CPU_BLOCK = 1 << 18  # logits; about what stays in a core's cache between passes


class PolicyLogProbs(nn.Module):
    """Maps packed sequences to the policy's log-probs. This module is what is wrapped for training.

    On a CPU under bfloat16 autocast, a Llama-like policy runs on the engine's own kernels (`FusedPolicy`):
    its log-probs are those of rollouts, bit for bit. Otherwise transformers' modules run.

    Args:
        policy: A causal LM whose logits are its output head applied to its decoder's output. Its dropout is
            turned off, so that the trained distribution is the one that was sampled from.
        fuse: Whether it may run on the engine's kernels; not where its parameters will be partitioned.

    Raises:
        UserError: when the logits are soft-capped or scaled, or when packing changes log-probs: training
            would then optimize another model.
    """

    def __init__(self, policy: PreTrainedModel, fuse: bool = True) -> None:
        super().__init__()
        self.policy = policy
        self._fuse = fuse
        self._fused: FusedPolicy | UnsupportedPolicy | None = None
        try:
            check_family(policy)
        except ValueError as error:
            raise UserError(f"policy.model: {error}") from None
        self._limit = text_limit(policy)
        turn_off_dropout(policy)
        wanted = check_head(policy)
        use_attention(policy, PACKED_ATTENTION)
        check_packing(policy, lambda batch: self(batch, 1.0)[0], wanted)

    def forward(
        self, batch: PackedBatch, temperature: float, entropy_gradient: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the log-prob of each target under softmax(logits / temperature), and the entropy there.

        Args:
            batch: The packed sequences.
            temperature: Sampling temperature of the rollouts.
            entropy_gradient: Whether the entropy is differentiable.

        Returns:
            Log-probs and entropies, both float32 [M], in nats.

        Raises:
            UserError: for a sequence that exceeds the policy's own limit of text length.
        """
        if self._limit is not None and int(batch.positions.max()) >= self._limit.tokens:
            name = type(self.policy).__name__
            raise UserError(
                f"{name} {self._limit.reason} past {self._limit.tokens} tokens: write rollout.max_context of "
                "at most that"
            )
        fused = self.fused
        if isinstance(fused, FusedPolicy):
            logprob, entropy = fused.scores(batch, temperature)
            return logprob, entropy if entropy_gradient else entropy.detach()
        with without_slow_bfloat16(self.policy.device):
            return self._scores_of_modules(batch, temperature, entropy_gradient)

    def _scores_of_modules(
        self, batch: PackedBatch, temperature: float, entropy_gradient: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns what `forward` returns, computed by transformers' modules."""
        hidden = decoder_of(self.policy)(
            input_ids=batch.tokens[None], position_ids=batch.positions[None], use_cache=False, packed=batch
        ).last_hidden_state[0, batch.predict]
        head = self.policy.get_output_embeddings()
        rows = head_rows(head.weight.shape[0], head.weight.device)
        logprobs, entropies = [], []
        for start in range(0, len(hidden), rows):
            piece = slice(start, start + rows)
            if torch.is_grad_enabled():
                logprob, entropy = checkpoint(
                    _score, head, hidden[piece], batch.targets[piece], temperature, use_reentrant=False
                )
            else:
                logprob, entropy = _score(head, hidden[piece], batch.targets[piece], temperature)
            logprobs.append(logprob)
            entropies.append(entropy if entropy_gradient else entropy.detach())
        return torch.cat(logprobs), torch.cat(entropies)

    @property
    def fused(self) -> FusedPolicy | UnsupportedPolicy:
        """The policy on the engine's kernels if these would run now, or why they do not."""
        if not self._fuse:
            return UnsupportedPolicy("its weights or activations are not whole on this rank")
        if self.policy.device.type != "cpu":
            return UnsupportedPolicy("it is not on a CPU")
        if not torch.is_autocast_enabled("cpu") or torch.get_autocast_dtype("cpu") != torch.bfloat16:
            return UnsupportedPolicy("it is not trained in bfloat16: write policy.mixed_precision: bf16")
        if self._fused is None:
            try:
                with torch.autocast("cpu", enabled=False):  # its layers are compared in float32
                    self._fused = FusedPolicy(self.policy)
            except UnsupportedPolicy as reason:
                self._fused = reason
        return self._fused


def _score(
    head: nn.Module, hidden: torch.Tensor, targets: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor]:
    logprob, entropy = TokenScores.apply(head(hidden), targets, temperature)
    return logprob, entropy


class TokenScores(torch.autograd.Function):
    """Computes log-probs of targets and entropies under softmax(logits / temperature), always in float32.

    With p the distribution and H its entropy, the gradient of a logit per unit of each output's gradient is
    (1[target] − p) / T and −p (log p + H) / T. A CPU computes a few rows at a time, so that they stay in its
    cache for all passes.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: torch.Tensor, targets: torch.Tensor, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns log-probs and entropies, float32 [M], for logits [M, V] and targets int64 [M]."""
        logprobs, entropies = (
            logits.new_empty(len(logits), dtype=torch.float32),
            logits.new_empty(len(logits), dtype=torch.float32),
        )
        for rows in _row_blocks(logits):
            log_p = _log_softmax(logits[rows], temperature)
            logprobs[rows] = log_p.gather(-1, targets[rows, None])[:, 0]
            entropies[rows] = -(log_p.exp().mul_(log_p)).sum(-1)
        ctx.save_for_backward(logits, targets, entropies)
        ctx.temperature = temperature
        return logprobs, entropies

    @staticmethod
    def backward(
        ctx: Any, of_logprob: torch.Tensor, of_entropy: torch.Tensor
    ) -> tuple[torch.Tensor, None, None]:
        """Returns the gradient of the logits, [M, V]."""
        logits, targets, entropies = ctx.saved_tensors
        scale, with_entropy = 1 / ctx.temperature, bool(of_entropy.any())
        grad = torch.empty_like(logits)
        for rows in _row_blocks(logits):
            log_p = _log_softmax(logits[rows], ctx.temperature)
            p = log_p.exp()
            wanted = -of_logprob[rows, None]
            if with_entropy:
                wanted = wanted - of_entropy[rows, None] * (log_p + entropies[rows, None])
            p.mul_(wanted.mul(scale)).scatter_add_(-1, targets[rows, None], of_logprob[rows, None] * scale)
            grad[rows] = p
        return grad, None, None


def _row_blocks(logits: torch.Tensor) -> Iterator[slice]:
    rows = len(logits) if logits.device.type != "cpu" else max(_CPU_BLOCK // logits.shape[1], 1)
    return (slice(start, start + rows) for start in range(0, len(logits), max(rows, 1)))


def _log_softmax(logits: torch.Tensor, temperature: float) -> torch.Tensor:
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    return torch.log_softmax(logits, dim=-1)
