"""Predicts completion lengths from the policy's hidden state of the prompt.

Source: ProD (Wang et al., arXiv 2604.07931).
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

Kind = Literal["prod_d", "prod_m", "one_shot"]


@dataclass(frozen=True, slots=True)
class Example:
    """A prompt's hidden state and the lengths of its completions.

    Attributes:
        state: float32 [hidden], the output head's input after the prompt.
        lengths: Lengths of its completions in tokens, at least one.
    """

    state: torch.Tensor
    lengths: tuple[int, ...]


class LengthPredictor:
    """A small head on the prompt's last hidden state, trained online on the lengths of finished groups.

    A prompt has a heavy-tailed distribution of lengths rather than one length, so several samples make better
    labels than one. ``prod_d`` is trained by cross-entropy on the distribution of the group's lengths over
    logarithmic bins. ``prod_m`` is trained by a Huber loss on the logarithm of their median. ``one_shot`` is
    trained as ``prod_d`` but on a single sample, as most predictors are; it serves as a baseline.

    Args:
        hidden: Size of a hidden state.
        longest: Maximum number of tokens of a completion.
        kind: ``prod_d``, ``prod_m`` or ``one_shot``.
        bins: Number of bins of the distribution.
        lr: AdamW's learning rate.
        memory: Number of latest prompts to train on.
        seed: Seed of the initial weights and of the choice of examples.

    Attributes:
        kind: ``prod_d``, ``prod_m`` or ``one_shot``.
        head: The network.
        seen: Number of prompts trained on.
    """

    def __init__(
        self,
        hidden: int,
        longest: int,
        kind: Kind,
        *,
        bins: int = 24,
        lr: float = 1e-3,
        memory: int = 512,
        seed: int = 0,
    ) -> None:
        self.kind = kind
        self._edges = torch.logspace(0, math.log10(longest + 1), bins + 1)
        self._generator = torch.Generator().manual_seed(seed)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            last = nn.Linear(64, 1 if kind == "prod_m" else bins)
            self.head = nn.Sequential(nn.LayerNorm(hidden), nn.Linear(hidden, 64), nn.GELU(), last)
        if kind == "prod_m":
            nn.init.constant_(last.bias, math.log(longest) / 2)  # start at √longest, as 1 is far off
        self._optimizer = torch.optim.AdamW(self.head.parameters(), lr=lr, weight_decay=0.01)
        # hidden states and training targets
        self._examples: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=memory)
        self._longest = longest
        self.seen = 0

    def learn(self, examples: Sequence[Example], updates: int = 20, batch: int = 64) -> float:
        """Adds examples and trains on them and on earlier ones.

        Args:
            examples: New examples.
            updates: Number of optimizer steps.
            batch: Maximum number of examples of a step.

        Returns:
            The mean loss; 0 if there are no examples.
        """
        self._examples.extend((e.state, self._target(e)) for e in examples)
        self.seen += len(examples)
        if not self._examples:
            return 0.0
        total, count = 0.0, len(self._examples)
        states, targets = (torch.stack(column) for column in zip(*self._examples, strict=True))
        for _ in range(updates):
            chosen = torch.randint(count, (min(batch, count),), generator=self._generator)
            out = self.head(states[chosen])
            if self.kind == "prod_m":
                loss = nn.functional.huber_loss(out[:, 0], targets[chosen], delta=0.5)
            else:
                loss = -(targets[chosen] * out.log_softmax(-1)).sum(-1).mean()
            self._optimizer.zero_grad()
            loss.backward()
            self._optimizer.step()
            total += float(loss.detach())
        return total / updates

    def _target(self, example: Example) -> torch.Tensor:
        """Returns an example's training target.

        It is a distribution over bins, float32 [bins], or for ``prod_m`` the logarithm of the median length,
        a scalar.
        """
        lengths = torch.tensor(example.lengths, dtype=torch.float32).clamp(1, self._longest)
        if self.kind == "prod_m":
            return lengths.quantile(0.5).log()
        samples = lengths[:1] if self.kind == "one_shot" else lengths
        bins = torch.bucketize(samples, self._edges[1:-1], right=True)
        return torch.bincount(bins, minlength=len(self._edges) - 1).float() / len(samples)

    @torch.no_grad()
    def quantile(self, states: torch.Tensor, q: float) -> torch.Tensor:
        """Predicts a quantile of the length distribution; ``prod_m`` always returns the median.

        Args:
            states: float32 [n, hidden].
            q: Quantile in (0, 1).

        Returns:
            float32 [n], in tokens.
        """
        out = self.head(states)
        if self.kind == "prod_m":
            return out[:, 0].exp().clamp(1, self._longest)
        cumulative = out.softmax(-1).cumsum(-1)
        bin_ = (cumulative < q).sum(-1).clamp(max=cumulative.shape[1] - 1)
        before = torch.where(
            bin_ > 0, cumulative.gather(1, (bin_ - 1).clamp(min=0)[:, None])[:, 0], torch.zeros(len(out))
        )
        mass = cumulative.gather(1, bin_[:, None])[:, 0] - before
        inside = ((q - before) / mass.clamp(min=1e-9)).clamp(0, 1)
        low, high = self._edges[bin_].log(), self._edges[bin_ + 1].log()
        return (low + inside * (high - low)).exp().clamp(1, self._longest)

    def state(self) -> dict[str, torch.Tensor]:
        """Returns the head's weights, without examples and optimizer moments."""
        return dict(self.head.state_dict())

    def load_state(self, state: dict[str, torch.Tensor], seen: int) -> None:
        """Loads what `state` returned; ``seen`` is the number of prompts it was trained on."""
        self.head.load_state_dict(state)
        self.seen = seen
