"""Log-probs and entropies of targets from hidden states, with the output head's gradient."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from paceline.rl.learner.fused.trained_linear import TrainedLinear
from paceline.rollout.native.gradients import GradientKernels

# Logits computed together. A micro-batch with fewer keeps them for its backward pass; others recompute them.
_LOGITS_PER_CHUNK = 1 << 26


def score_targets(
    head: TrainedLinear,
    kernels: GradientKernels,
    hidden: torch.Tensor,
    targets: torch.Tensor,
    temperature: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Computes log-probs of targets under softmax(logits / temperature), and entropies, differentiably.

    Args:
        head: The output head.
        kernels: Kernels of the backward pass.
        hidden: Inputs of the head, bfloat16 [M, hidden].
        targets: Token ids, int64 [M].
        temperature: Sampling temperature, above 0.

    Returns:
        Log-probs and entropies, float32 [M] each, in nats. The log-probs are the engine's, bit for bit.
    """
    logprobs, entropies = _HeadScores.apply(hidden, head, kernels, targets, temperature, *head.parameters)
    return logprobs, entropies


class _HeadScores(torch.autograd.Function):
    """The output head and the scores as one operation of autograd."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        head: TrainedLinear,
        kernels: GradientKernels,
        targets: torch.Tensor,
        temperature: float,
        *parameters: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns log-probs and entropies."""
        outputs = torch.empty(3, len(targets))
        logits = None
        for rows in _chunks(len(targets), len(parameters[0])):
            logits = head(hidden[rows])
            outputs[:, rows] = torch.stack(kernels.score(logits, targets[rows], temperature))
        whole = logits is not None and len(logits) == len(targets)
        ctx.logits = logits if whole and any(ctx.needs_input_grad) else None
        ctx.head, ctx.kernels, ctx.temperature = head, kernels, temperature
        ctx.save_for_backward(hidden, targets, outputs)
        return outputs[0].clone(), outputs[1].clone()

    @staticmethod
    def backward(
        ctx: Any, of_logprobs: torch.Tensor, of_entropies: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        """Returns the gradients of hidden states and parameters."""
        hidden, targets, outputs = ctx.saved_tensors
        of_hidden = torch.empty_like(hidden)
        of_parameters: list[torch.Tensor | None] = [None] * len(ctx.head.parameters)
        vocabulary = len(ctx.head.parameters[0])
        for rows in _chunks(len(targets), vocabulary):
            logits = ctx.head(hidden[rows]) if ctx.logits is None else ctx.logits
            ctx.kernels.score_backward(
                logits,
                targets[rows],
                ctx.temperature,
                (outputs[1, rows].contiguous(), outputs[2, rows].contiguous()),
                (of_logprobs[rows].contiguous(), of_entropies[rows].contiguous()),
            )
            of_hidden[rows] = ctx.head.input_gradient(logits)
            more = ctx.head.parameter_gradients(logits, hidden[rows])
            of_parameters = [
                b if a is None else a if b is None else a.add_(b)
                for a, b in zip(of_parameters, more, strict=True)
            ]
        ctx.logits = None
        return of_hidden, None, None, None, None, *of_parameters


def _chunks(rows: int, vocabulary: int) -> Iterator[slice]:
    step = max(_LOGITS_PER_CHUNK // vocabulary, 1)
    return (slice(start, start + step) for start in range(0, rows, step))
