"""Stop policies: rules that end a draft chain before its strategy's depth."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from paceline.rollout.trees.chain import StopPolicy

_FEATURES = 4  # one, the token's log-probability, the entropy, the depth
_LEARNING_RATE = 0.05


def entropy(log_q: torch.Tensor) -> torch.Tensor:
    """Returns the entropy in nats of each row: float32 [B], from log-probs [B, W]."""
    return -(log_q.exp() * log_q.clamp(min=-1e4)).sum(-1)


class EntropyThreshold:
    """Continues a chain while the square root of the draft distribution's entropy is at most a threshold.

    SVIP (Zhang et al., "Draft Model Knows When to Stop", arXiv 2411.18462): 1 − √(c·H(q)) is approximately a
    lower bound of the acceptance probability.

    Args:
        threshold: Maximum √H(q), with the entropy in nats.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold

    def begin(self, batch: int) -> None:
        """Does nothing: no state is kept between drafts."""

    def should_continue(self, log_q: torch.Tensor) -> torch.Tensor:
        """Returns bool [B], the rows with √H(q) within the threshold."""
        return entropy(log_q).clamp(min=0).sqrt() <= self.threshold

    def drawn(self, log_q: torch.Tensor, columns: torch.Tensor) -> None:
        """Does nothing: the decision depends on the distribution alone."""


class LearnedThreshold:
    """Stops a chain when the predicted probability of any rejection in it exceeds a threshold.

    SpecDec++ (Huang et al., arXiv 2405.19715) shows that the optimal rule has this form. The paper's
    acceptance head reads the draft model's hidden state. This one is a logistic regression on the token's
    log-probability, the entropy of the distribution and the depth, trained by gradient descent on every
    verification, so that it follows the drafter.

    Args:
        threshold: Maximum probability that any drafted token is rejected.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self.weights = torch.zeros(_FEATURES)
        self.weights[0] = 1.0
        self._features: list[torch.Tensor] = []
        self._all_accepted = torch.ones(0)

    def begin(self, batch: int) -> None:
        """Resets the features and the predicted acceptance for a draft of ``batch`` rows."""
        self._features = []
        self._all_accepted = torch.ones(batch)

    def should_continue(self, log_q: torch.Tensor) -> torch.Tensor:
        """Returns bool [B], the rows whose predicted probability of a rejection is within the threshold."""
        return (1 - self._all_accepted <= self.threshold).to(log_q.device)

    def drawn(self, log_q: torch.Tensor, columns: torch.Tensor) -> None:
        """Multiplies in the predicted acceptance of the drawn tokens and keeps their features for `learn`."""
        own = log_q.gather(-1, columns[:, None])[:, 0]
        depth = torch.full_like(own, float(len(self._features)))
        x = torch.stack([torch.ones_like(own), own, entropy(log_q), depth], -1).cpu()
        self._features.append(x)
        self._all_accepted = self._all_accepted * torch.sigmoid(x @ self.weights)

    def learn(self, lengths: Sequence[int], accepted: Sequence[int]) -> None:
        """Takes one gradient step on the last draft.

        Each row contributes its tokens up to and including the first rejection.

        Args:
            lengths: Number of draft tokens of each row, in order.
            accepted: Number of accepted ones of each row.
        """
        if not self._features:
            return
        x = torch.stack(self._features, 1)
        depth = torch.arange(x.shape[1])
        kept, drafted = torch.tensor(accepted)[:, None], torch.tensor(lengths)[:, None]
        seen = (depth <= kept) & (depth < drafted)
        error = torch.sigmoid(x @ self.weights) - (depth < kept).float()
        gradient = (error * seen)[..., None] * x
        self.weights -= _LEARNING_RATE * gradient.sum((0, 1)) / seen.sum().clamp(min=1)
        self._features = []


STOP_POLICIES: dict[str, Callable[[float], StopPolicy] | None] = {
    "fixed": None,
    "svip": EntropyThreshold,
    "specdec": LearnedThreshold,
}
"""Constructors of stop policies by name, given the threshold; ``fixed`` drafts to the strategy's depth."""
