"""Completion lengths from the policy's own reading of the prompt (ProD, Wang et al., arXiv 2604.07931)."""

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
    """A prompt and what came of it.

    Attributes:
        state: float32 [hidden], what the policy's output head read after the prompt.
        lengths: Of its completions, at least one.
    """

    state: torch.Tensor
    lengths: tuple[int, ...]


class LengthPredictor:
    """A small head on the prompt's last hidden state, trained online on what groups turned out to be.

    A prompt has a distribution of lengths, not a length, and a heavy-tailed one: several samples make better
    labels than one. ``prod_d`` learns the distribution of the group's lengths over logarithmic bins by
    cross-entropy; ``prod_m`` their median, in the logarithm, by a Huber loss; ``one_shot`` the same as
    ``prod_d`` from a single sample, as most predictors are trained: for comparison.

    Args:
        hidden: Size of a state.
        longest: Most tokens of a completion.
        kind: Which.
        bins: Of the distribution.
        lr: AdamW's learning rate.
        memory: Prompts that are learned from; older ones are let go.
        seed: Of initial weights and of which examples an update takes.
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
            nn.init.constant_(last.bias, math.log(longest) / 2)  # not a length of 1, which is far from any
        self._optimizer = torch.optim.AdamW(self.head.parameters(), lr=lr, weight_decay=0.01)
        # states and what is to be said of them
        self._known: deque[tuple[torch.Tensor, torch.Tensor]] = deque(maxlen=memory)
        self._longest = longest
        self.seen = 0

    def learn(self, examples: Sequence[Example], updates: int = 20, batch: int = 64) -> float:
        """Takes examples in and trains on them and earlier ones. Returns the mean loss, 0 where there is
        nothing to learn from.
        """
        self._known.extend((e.state, self._target(e)) for e in examples)
        self.seen += len(examples)
        if not self._known:
            return 0.0
        total, count = 0.0, len(self._known)
        states, targets = (torch.stack(column) for column in zip(*self._known, strict=True))
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
        lengths = torch.tensor(example.lengths, dtype=torch.float32).clamp(1, self._longest)
        if self.kind == "prod_m":
            return lengths.quantile(0.5).log()
        taken = lengths[:1] if self.kind == "one_shot" else lengths
        bins = torch.bucketize(taken, self._edges[1:-1], right=True)
        return torch.bincount(bins, minlength=len(self._edges) - 1).float() / len(taken)

    @torch.no_grad()
    def quantile(self, states: torch.Tensor, q: float) -> torch.Tensor:
        """Predicted quantiles, in tokens; of ``prod_m`` the median, whatever is asked.

        Args:
            states: float32 [n, hidden].
            q: In (0, 1).

        Returns:
            float32 [n].
        """
        out = self.head(states)
        if self.kind == "prod_m":
            return out[:, 0].exp().clamp(1, self._longest)
        reached = out.softmax(-1).cumsum(-1)
        bin_ = (reached < q).sum(-1).clamp(max=reached.shape[1] - 1)
        before = torch.where(
            bin_ > 0, reached.gather(1, (bin_ - 1).clamp(min=0)[:, None])[:, 0], torch.zeros(len(out))
        )
        mass = reached.gather(1, bin_[:, None])[:, 0] - before
        inside = ((q - before) / mass.clamp(min=1e-9)).clamp(0, 1)
        low, high = self._edges[bin_].log(), self._edges[bin_ + 1].log()
        return (low + inside * (high - low)).exp().clamp(1, self._longest)

    def state(self) -> dict[str, torch.Tensor]:
        """The head's weights; examples and moments are let go."""
        return dict(self.head.state_dict())

    def load_state(self, state: dict[str, torch.Tensor], seen: int) -> None:
        """Goes on from what `state` gave, after so many prompts."""
        self.head.load_state_dict(state)
        self.seen = seen
