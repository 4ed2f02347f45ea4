"""Budget guidance (Li et al., arXiv 2506.13752): LOSSY, for evaluation only.

A small head predicts the number of tokens left as a Gamma distribution. While a model decodes, each likely
next token is weighted by the probability that the rest of the completion fits into what is left of a token
budget. This changes the output distribution, so it is not part of the engine and RL rollouts cannot use it:
it works on transformers' ``generate``.
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

_MIN_WEIGHT = 1e-3  # keeps a token possible if no continuation fits the budget


@dataclass(frozen=True, slots=True)
class TokenStates:
    """Hidden states, sampled tokens and remaining lengths at N positions of completions.

    Attributes:
        states: float32 [N, hidden], the inputs of the output head.
        tokens: int64 [N], the token sampled from each.
        left: float32 [N], number of tokens that followed, at least 0.
    """

    states: torch.Tensor
    tokens: torch.Tensor
    left: torch.Tensor


def token_states(rollouts: Sequence[Rollout]) -> TokenStates:
    """Collects every sampled token of the rollouts that have traces."""
    states, tokens, left = [], [], []
    for rollout in rollouts:
        if rollout.trace is None:
            continue
        trace, count = rollout.trace, len(rollout.token_ids)
        states.append(trace.final[trace.num_prompt - 1 :].float())
        tokens.append(trace.token_ids[trace.num_prompt :])
        left.append(torch.arange(count - 1, -1, -1, dtype=torch.float32))
    return TokenStates(torch.cat(states), torch.cat(tokens), torch.cat(left))


class RemainingLength(nn.Module):
    """Predicts a Gamma distribution of the number of tokens left after a token.

    Its inputs are the hidden state that the token was sampled from and the token's embedding.

    Args:
        hidden: Size of a hidden state.
        embeddings: [V, hidden], the policy's input embeddings; not trained.
    """

    def __init__(self, hidden: int, embeddings: torch.Tensor) -> None:
        super().__init__()
        self.register_buffer("embeddings", embeddings.detach().float(), persistent=False)
        self.net = nn.Sequential(
            nn.LayerNorm(2 * hidden), nn.Linear(2 * hidden, 128), nn.GELU(), nn.Linear(128, 2)
        )

    def forward(self, states: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns shape and rate of the Gamma distribution, float32 [...] each.

        Args:
            states: float32 [..., hidden].
            tokens: int64 [...].
        """
        embedded: Any = self.embeddings
        out = self.net(
            torch.cat([states, nn.functional.layer_norm(embedded[tokens], states.shape[-1:])], dim=-1)
        )
        shape, mean = nn.functional.softplus(out[..., 0]) + 0.1, torch.exp(out[..., 1].clamp(-3, 12))
        return shape, shape / mean

    def loss(self, steps: TokenStates) -> torch.Tensor:
        """Returns the mean negative log-likelihood of the tokens left.

        A count n is evaluated at n + 0.5, the middle of its unit interval.
        """
        shape, rate = self(steps.states, steps.tokens)
        return -torch.distributions.Gamma(shape, rate).log_prob(steps.left + 0.5).mean()

    @torch.no_grad()
    def fits(self, states: torch.Tensor, tokens: torch.Tensor, room: torch.Tensor) -> torch.Tensor:
        """Returns the probability that at most ``room`` tokens are left; all tensors have one shape [...]."""
        shape, rate = self(states, tokens)
        return torch.special.gammainc(shape, rate * (room.clamp(min=0) + 0.5))


def train_remaining(
    head: RemainingLength, steps: TokenStates, updates: int = 300, batch: int = 512, seed: int = 0
) -> list[float]:
    """Trains the head with AdamW on random positions and returns the losses."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for _ in range(updates):
        chosen = torch.randint(len(steps.left), (min(batch, len(steps.left)),), generator=generator)
        loss = head.loss(TokenStates(steps.states[chosen], steps.tokens[chosen], steps.left[chosen]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


class BudgetGuidance(LogitsProcessor):
    """Weights each of the likeliest tokens by the probability that its continuation fits the budget.

    All other tokens are excluded.

    Args:
        head: Trained head.
        budget: Token budget of a completion.
        prompt: Number of tokens of the prompts, padding included.
        candidates: Number of likeliest tokens to weight.

    Attributes:
        states: float [B, hidden], the latest inputs of the output head; set by `recording_states`.
    """

    def __init__(self, head: RemainingLength, budget: int, prompt: int, candidates: int = 20) -> None:
        self._head, self._budget, self._prompt, self._candidates = head, budget, prompt, candidates
        self.states: torch.Tensor | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        """Returns the scores [B, V] of the next token, weighted by the budget."""
        assert self.states is not None
        top_scores, tokens = scores.topk(min(self._candidates, scores.shape[-1]), dim=-1)
        room = torch.full(tokens.shape, float(self._budget - (input_ids.shape[1] - self._prompt) - 1))
        states = self.states.float()[:, None].expand(*tokens.shape, -1)
        weights = self._head.fits(states, tokens, room).clamp(min=_MIN_WEIGHT)
        steered: Any = torch.full_like(scores, -math.inf).scatter(-1, tokens, top_scores + weights.log())
        return steered


@contextmanager
def recording_states(model: PreTrainedModel, guidance: BudgetGuidance) -> Iterator[None]:
    """Records the inputs of the model's output head in ``guidance.states`` while the context is open."""

    def record(module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        guidance.states = args[0][:, -1].detach()

    hook = model.get_output_embeddings().register_forward_pre_hook(record)
    try:
        yield
    finally:
        hook.remove()
