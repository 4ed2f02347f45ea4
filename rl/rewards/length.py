"""Length-aware rewards of a completion by itself: budgets, targets, limits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from paceline.rl.rewards.terms import RewardTerm, Samples


@dataclass(frozen=True, slots=True)
class L1Exact(RewardTerm):
    """Length-controlled policy optimization, exact: r − α |b − n| (Aggarwal and Welleck, arXiv 2503.04697,
    equation 1).

    Attributes:
        alpha: α, reward for each token beside the budget.
    """

    alpha: float = 0.0003
    needs_budgets = True

    def rewards(self, samples: Samples) -> torch.Tensor:
        return samples.rewards - self.alpha * (samples.asked() - samples.lengths).abs()


@dataclass(frozen=True, slots=True)
class L1Max(RewardTerm):
    """The same with a budget as an upper limit: r · clip(α (b − n) + δ, 0, 1) (the same, equation 2). A
    correct completion that overruns a little still earns more than a wrong one.

    Attributes:
        alpha: α, share of the reward for each token below the budget.
        delta: δ, share of it at the budget.
    """

    alpha: float = 0.0003
    delta: float = 0.5
    needs_budgets = True

    def rewards(self, samples: Samples) -> torch.Tensor:
        return samples.rewards * (self.alpha * (samples.asked() - samples.lengths) + self.delta).clamp(0, 1)


@dataclass(frozen=True, slots=True)
class Overlong(RewardTerm):
    """DAPO's soft overlong punishment (arXiv 2503.14476, equation 13), added to the reward: 0 up to L − c
    tokens, then ((L − c) − n) / c, down to −1 at the limit L.

    Attributes:
        cache: c, tokens before the limit over which it grows.
        limit: L; null takes ``rollout.max_tokens``.
    """

    cache: int = 64
    limit: int | None = None

    def rewards(self, samples: Samples) -> torch.Tensor:
        limit = samples.longest if self.limit is None else self.limit
        return samples.rewards + ((limit - self.cache - samples.lengths) / self.cache).clamp(-1, 0)


@dataclass(frozen=True, slots=True)
class Target(RewardTerm):
    """A length to come near to, which may be a longer one: (1 − w) r + w s, with LongWriter's length score
    (Bai et al., arXiv 2408.07055, equation 1): s = max(0, 1 − (n / b − 1) / 3) above the target b, max(0, 1 −
    (b / n − 1) / 2) below it.

    Attributes:
        weight: w.
        tokens: b; null takes each one's budget.
    """

    weight: float = 0.5
    tokens: int | None = None

    @property
    def needs_budgets(self) -> bool:  # type: ignore[override]
        return self.tokens is None

    def rewards(self, samples: Samples) -> torch.Tensor:
        lengths = samples.lengths.float().clamp(min=1)
        wanted = samples.asked() if self.tokens is None else torch.full_like(lengths, self.tokens)
        above = 1 - (lengths / wanted - 1) / 3
        below = 1 - (wanted / lengths - 1) / 2
        score = torch.where(lengths > wanted, above, below).clamp(min=0)
        return (1 - self.weight) * samples.rewards + self.weight * score


@dataclass(frozen=True, slots=True)
class Hbpo(RewardTerm):
    """Hierarchical budget policy optimization (Lyu et al., arXiv 2507.15844, section 3 and its reference
    code).

    Each sample of a group was asked for one of a few budgets. A correct one of n tokens, asked for b, gets
    min(w cos(π n / 2L) − α |n − b|, w cos(π b / 2L)): inside its budget no less for being longer than others,
    beyond it less. A wrong one gets 0. To the group's advantage comes how far the mean reward of the samples
    of the same budget lies from the most that this budget can earn, w cos(π b / 2L). The reference code adds
    that twice; here it counts once, as the paper writes it.

    Attributes:
        scale: w.
        alpha: α; null takes 1 / L.
        limit: L; null takes ``rollout.max_tokens``.
    """

    scale: float = 4.0
    alpha: float | None = None
    limit: int | None = None
    needs_budgets = True
    needs_group = True

    def _most(self, tokens: torch.Tensor, samples: Samples) -> torch.Tensor:
        limit = samples.longest if self.limit is None else self.limit
        return self.scale * torch.cos(math.pi * tokens.float() / (2 * limit))

    def rewards(self, samples: Samples) -> torch.Tensor:
        limit = samples.longest if self.limit is None else self.limit
        alpha = 1 / limit if self.alpha is None else self.alpha
        budgets = samples.asked()
        own = self._most(samples.lengths, samples) - alpha * (samples.lengths - budgets).abs()
        inside = samples.correct & (samples.lengths <= limit)
        return torch.where(inside, torch.minimum(own, self._most(budgets, samples)), torch.zeros_like(own))

    def advantages(self, samples: Samples) -> torch.Tensor | None:
        budgets, rewards = samples.grouped(samples.asked()), samples.grouped(samples.rewards)
        same = (budgets[:, :, None] == budgets[:, None, :]).float()
        mean = (same * rewards[:, None, :]).sum(-1) / same.sum(-1)
        return mean.flatten() - self._most(samples.asked(), samples)


@dataclass(frozen=True, slots=True)
class Linear(RewardTerm):
    """The naive penalty, r − α n / L, whether right or wrong: what the others are measured against. It can
    pay a policy to say nothing (GRPO-λ's and HBPO's papers); `paceline.rl.monitoring.collapse_guard` names
    that collapse.

    Attributes:
        alpha: α.
    """

    alpha: float = 0.5

    def rewards(self, samples: Samples) -> torch.Tensor:
        return samples.rewards - self.alpha * samples.lengths / samples.longest
