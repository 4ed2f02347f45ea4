"""When a draft chain ends before its strategy's depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from paceline.rollout.trees.chain import StopPolicy

_FEATURES = 4
_RATE = 0.05


def entropy(log_q: torch.Tensor) -> torch.Tensor:
    """Nats of each row: float32 [B] from log-probs [B, W]."""
    return -(log_q.exp() * log_q.clamp(min=-1e4)).sum(-1)


class EntropyThreshold:
    """SVIP (Zhang et al., "Draft Model Knows When to Stop", arXiv 2411.18462): goes on while √H(q) is at most
    a threshold, because 1 − √(c·H(q)) is approximately a lower bound of the chance to be accepted.

    Args:
        threshold: Of the square root of the draft distribution's entropy in nats.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def begin(self, batch: int) -> None:
        """Nothing is carried from draft to draft."""

    def should_continue(self, log_q: torch.Tensor) -> torch.Tensor:
        return entropy(log_q).clamp(min=0).sqrt() <= self.threshold

    def drawn(self, log_q: torch.Tensor, columns: torch.Tensor) -> None:
        """Only the distribution counts."""


class LearnedThreshold:
    """SpecDec++ (Huang et al., arXiv 2405.19715): stops when the predicted probability that some token of the
    draft is rejected exceeds a threshold, the form of the optimal rule.

    The paper's acceptance head reads the draft model's hidden state; this one is a logistic regression on the
    token's log-probability, the distribution's entropy and the depth, learned by gradient descent from every
    verification, so that it follows the drafter.

    Args:
        threshold: Most probability that any drafted token is rejected.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.weights = torch.zeros(_FEATURES)
        self.weights[0] = 1.0
        self._features: list[torch.Tensor] = []
        self._all_kept = torch.ones(0)

    def begin(self, batch: int) -> None:
        self._features = []
        self._all_kept = torch.ones(batch)

    def should_continue(self, log_q: torch.Tensor) -> torch.Tensor:
        return (1 - self._all_kept <= self.threshold).to(log_q.device)

    def drawn(self, log_q: torch.Tensor, columns: torch.Tensor) -> None:
        own = log_q.gather(-1, columns[:, None])[:, 0]
        depth = torch.full_like(own, float(len(self._features)))
        x = torch.stack([torch.ones_like(own), own, entropy(log_q), depth], -1).cpu()
        self._features.append(x)
        self._all_kept = self._all_kept * torch.sigmoid(x @ self.weights)

    def learn(self, lengths: Sequence[int], accepted: Sequence[int]) -> None:
        """One gradient step on the last draft: its tokens up to the first rejection, of rows in order."""
        if not self._features:
            return
        x = torch.stack(self._features, 1)
        depth = torch.arange(x.shape[1])
        kept, drafted = torch.tensor(accepted)[:, None], torch.tensor(lengths)[:, None]
        seen = (depth <= kept) & (depth < drafted)
        error = torch.sigmoid(x @ self.weights) - (depth < kept).float()
        gradient = (error * seen)[..., None] * x
        self.weights -= _RATE * gradient.sum((0, 1)) / seen.sum().clamp(min=1)
        self._features = []


STOP_POLICIES: dict[str, Callable[[float], StopPolicy] | None] = {
    "fixed": None,
    "svip": EntropyThreshold,
    "specdec": LearnedThreshold,
}
"""``fixed`` drafts as deep as the strategy says."""
