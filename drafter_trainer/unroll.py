"""Training-time test: the drafter is trained on its own outputs, as it will run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from drafter_trainer.losses import soft_cross_entropy
from rollout.api import DistillationTrace
from rollout.drafters.eagle3_model import Eagle3Model, attention_shape

_CHUNK = 256


@dataclass(frozen=True, slots=True)
class DraftBatch:
    """Traces padded to L anchors. Anchor a reads the features at position a and token a + 1.

    Attributes:
        tokens: int64 [B, L + 1 + unroll], padded with 0.
        taps: [B, L, taps * hidden].
        teacher: float32 [B, L + unroll, W], the target's probabilities of the draft vocabulary *after* position a.
        trained: bool [B, L + unroll], whether that distribution is known (it produced a completion token).
    """

    tokens: torch.Tensor
    taps: torch.Tensor
    teacher: torch.Tensor
    trained: torch.Tensor


@torch.no_grad()
def make_batch(
    traces: Sequence[DistillationTrace], head: nn.Module, vocabulary: torch.Tensor, temperature: float, unroll: int
) -> DraftBatch:
    """Collates traces and computes the teacher's distribution from the stored head inputs: no forward of the target is run.

    Args:
        traces: Of one micro-batch.
        head: The target's output head, as it was when the traces were made.
        vocabulary: int64 [W], the draft vocabulary.
        temperature: Of the rollouts.
        unroll: Draft positions trained on.
    """
    longest = max(len(t.token_ids) for t in traces) - 1
    batch, width = len(traces), longest + unroll
    device = traces[0].taps.device
    tokens = torch.zeros(batch, width + 1, dtype=torch.long, device=device)
    taps = torch.zeros(batch, longest, traces[0].taps.shape[-1], device=device)
    trained = torch.zeros(batch, width, dtype=torch.bool, device=device)
    finals = []
    for row, trace in enumerate(traces):
        count = len(trace.token_ids)
        tokens[row, :count] = trace.token_ids
        taps[row, : count - 1] = trace.taps
        trained[row, trace.num_prompt - 1 : count - 1] = True
        finals.append(trace.final[trace.num_prompt - 1 :])
    teacher = torch.zeros(batch, width, len(vocabulary), device=device)
    teacher[trained] = torch.cat([_teacher(head, f, vocabulary, temperature) for f in torch.cat(finals).split(_CHUNK)])
    return DraftBatch(tokens, taps, teacher, trained)


def _teacher(head: nn.Module, final: torch.Tensor, vocabulary: torch.Tensor, temperature: float) -> torch.Tensor:
    """The target's probabilities of the draft vocabulary: [M, hidden] → float32 [M, W]. Its own softmax runs over all tokens."""
    logits = head(final).float() / temperature
    return torch.exp(logits[:, vocabulary] - torch.logsumexp(logits, dim=-1, keepdim=True))


def unrolled_loss(
    model: Eagle3Model, embed_tokens: nn.Module, batch: DraftBatch, unroll: int, decay: float
) -> tuple[torch.Tensor, list[float]]:
    """Loss over ``unroll`` draft positions, each fed with the output of the one before (EAGLE-3, arXiv 2503.01840, section 3.2,
    figure 6).

    At step m, anchor a attends to the real features of anchors ≤ a and to its own steps 1 … m, as a draft started at a does. Only
    anchors from the prompt's last token on count, where drafting can start.

    Args:
        model: The drafter.
        embed_tokens: The target's input embedding, frozen.
        batch: From `make_batch`.
        unroll: Steps.
        decay: Weight of step m is ``decay ** m``.

    Returns:
        The mean loss of a trained position, and for each step the expected acceptance Σ_y min(p, q) over trained positions.
    """
    anchors = batch.taps.shape[1]
    positions = torch.arange(anchors, device=batch.tokens.device).expand(len(batch.tokens), anchors)
    hidden = model.fc(batch.taps)
    attention = _UnrolledAttention(positions, attention_shape(model.config)[2] ** -0.5)
    total = hidden.new_zeros(())
    weights = 0.0
    acceptance = []
    for step in range(unroll):
        with torch.no_grad():
            embeds = embed_tokens(batch.tokens[:, 1 + step : 1 + step + anchors]).to(hidden.dtype)
        hidden = model.step(embeds, hidden, positions + step, attention)
        counted = batch.trained[:, :anchors] & batch.trained[:, 1 + step : 1 + step + anchors]
        teacher = batch.teacher[:, 1 + step : 1 + step + anchors][counted]
        logits = model.logits(hidden[counted])
        total = total + decay**step * soft_cross_entropy(logits, teacher).sum() / max(len(teacher), 1)
        weights += decay**step
        with torch.no_grad():
            kept = torch.minimum(torch.softmax(logits.float(), -1), teacher).sum()
            acceptance.append(float(kept) / max(len(teacher), 1))
    return total / weights, acceptance


class _UnrolledAttention:
    """Keeps step 0's keys (the real features, attended causally) and, for each later step, one key for each anchor."""

    def __init__(self, positions: torch.Tensor, scaling: float) -> None:
        self._keys: list[torch.Tensor] = []
        self._values: list[torch.Tensor] = []
        self._scaling = scaling
        self._future = positions[0] > positions[0, :, None]

    def __call__(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        repeat = query.shape[1] // key.shape[1]
        self._keys.append(key.repeat_interleave(repeat, dim=1))
        self._values.append(value.repeat_interleave(repeat, dim=1))
        query = query * self._scaling
        scores = (query @ self._keys[0].transpose(-1, -2)).masked_fill(self._future, float("-inf"))
        own = [(query * k).sum(-1, keepdim=True) for k in self._keys[1:]]
        weights = torch.softmax(torch.cat([scores, *own], dim=-1), dim=-1)
        anchors = scores.shape[-1]
        out = weights[..., :anchors] @ self._values[0]
        for step, v in enumerate(self._values[1:]):
            out = out + weights[..., anchors + step, None] * v
        return out.transpose(1, 2)
