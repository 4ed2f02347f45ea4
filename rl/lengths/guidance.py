"""Budget guidance (Li et al., arXiv 2506.13752): LOSSY, for evaluation only.

A small head predicts how many tokens are left as a Gamma distribution. While a model decodes, each likely
next token is weighed by the probability that what follows it fits into what is left of a budget. That changes
the output distribution, so it is no part of
the engine and cannot be reached from RL rollouts: it works on transformers' ``generate``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LogitsProcessor, PreTrainedModel

from paceline.rollout import Rollout

_LEAST = 1e-3


@dataclass(frozen=True, slots=True)
class Steps:
    """Positions of completions; N of them.

    Attributes:
        states: float32 [N, hidden], what the output head read.
        tokens: int64 [N], what was drawn from it.
        left: float32 [N], tokens that followed, at least 0.
    """

    states: torch.Tensor
    tokens: torch.Tensor
    left: torch.Tensor


def steps_of(rollouts: Sequence[Rollout]) -> Steps:
    """Every drawn token of rollouts that have traces and ended by themselves or at their limit."""
    states, tokens, left = [], [], []
    for rollout in rollouts:
        if rollout.trace is None:
            continue
        trace, count = rollout.trace, len(rollout.token_ids)
        states.append(trace.final[trace.num_prompt - 1 :].float())
        tokens.append(trace.token_ids[trace.num_prompt :])
        left.append(torch.arange(count - 1, -1, -1, dtype=torch.float32))
    return Steps(torch.cat(states), torch.cat(tokens), torch.cat(left))


class RemainingLength(nn.Module):
    """Gamma distribution of the tokens left after a token, from the state that it was drawn from and its
    embedding.

    Args:
        hidden: Size of a state.
        embeddings: [V, hidden], the policy's; not trained.
    """

    def __init__(self, hidden: int, embeddings: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("embeddings", embeddings.detach().float(), persistent=False)
        self.net = nn.Sequential(
            nn.LayerNorm(2 * hidden), nn.Linear(2 * hidden, 128), nn.GELU(), nn.Linear(128, 2)
        )

    def forward(self, states: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Shape and rate, float32 [..., ], of states [..., hidden] and tokens [...]."""
        embedded: Any = self.embeddings
        out = self.net(
            torch.cat([states, nn.functional.layer_norm(embedded[tokens], states.shape[-1:])], dim=-1)
        )
        shape, mean = nn.functional.softplus(out[..., 0]) + 0.1, torch.exp(out[..., 1].clamp(-3, 12))
        return shape, shape / mean

    def loss(self, steps: Steps) -> torch.Tensor:
        """Mean negative log-likelihood of the tokens left, each as the middle of its unit."""
        shape, rate = self(steps.states, steps.tokens)
        return -torch.distributions.Gamma(shape, rate).log_prob(steps.left + 0.5).mean()

    @torch.no_grad()
    def fits(self, states: torch.Tensor, tokens: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        """Probability that at most ``room`` tokens are left; all of one shape [...]."""
        shape, rate = self(states, tokens)
        return torch.special.gammainc(shape, rate * (room.clamp(min=0) + 0.5))


def train_remaining(
    head: RemainingLength, steps: Steps, updates: int = 300, batch: int = 512, seed: int = 0
) -> list[float]:
    """AdamW on random positions. Returns the losses."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(updates):
        chosen = torch.randint(len(steps.left), (min(batch, len(steps.left)),), generator=generator)
        loss = head.loss(Steps(steps.states[chosen], steps.tokens[chosen], steps.left[chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


class BudgetGuidance(LogitsProcessor):
    """Weighs each of the likeliest tokens by the chance that its continuation fits the budget; the others are
    left out.

    Args:
        head: Trained.
        budget: Tokens of a completion.
        prompt: Tokens of the prompts, padding included.
        candidates: Likeliest tokens that are weighed.
    """

    def __init__(self, head: RemainingLength, budget: int, prompt: int, candidates: int = 20) -> None:
        self._head, self._budget, self._prompt, self._candidates = head, budget, prompt, candidates
        self.states: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        assert self.states is not None
        kept, tokens = scores.topk(min(self._candidates, scores.shape[-1]), dim=-1)
        room = torch.full(tokens.shape, float(self._budget - (input_ids.shape[1] - self._prompt) - 1))
        states = self.states.float()[:, None].expand(*tokens.shape, -1)
        weights = self._head.fits(states, tokens, room).clamp(min=_LEAST)
        steered: Any = torch.full_like(scores, -math.inf).scatter(-1, tokens, kept + weights.log())
        return steered


@contextmanager
def watching(model: PreTrainedModel, guidance: BudgetGuidance) -> Iterator[None]:
    """Shows the guidance what the model's output head reads."""

    def note(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        guidance.states = args[0][:, -1].detach()

    hook = model.get_output_embeddings().register_forward_pre_hook(note)
    try:
        yield
    finally:
        hook.remove()
