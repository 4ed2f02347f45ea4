"""Length-aware rewards that judge each completion on its own: budgets, targets and limits."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from paceline.rl.rewards.terms import RewardTerm, Samples


@dataclass(frozen=True, slots=True)
class L1Exact(RewardTerm):
    """Rewards keeping to a budget exactly: r − α |b − n|, for n tokens and a budget of b.

    Length-controlled policy optimization, exact variant (Aggarwal and Welleck, arXiv 2503.04697, equation 1).

    Attributes:
        alpha: α, the penalty for each token of difference from the budget.
    """

    alpha: float = 0.0003
    needs_budgets = True

    def rewards(self, samples: Samples) -> torch.Tensor:
        """Returns r − α |b − n|, float32 [S]."""
        return samples.rewards - self.alpha * (samples.required_budgets() - samples.lengths).abs()


@dataclass(frozen=True, slots=True)
class L1Max(RewardTerm):
    """Treats the budget as an upper limit: r · clip(α (b − n) + δ, 0, 1), for n tokens and a budget of b.

    Length-controlled policy optimization, maximum variant (Aggarwal and Welleck, arXiv 2503.04697, equation
    2). A correct completion that slightly exceeds its budget still earns more than a wrong one.

    Attributes:
        alpha: α, the fraction of the reward gained for each token below the budget.
        delta: δ, the fraction of the reward earned exactly at the budget.
    """

    alpha: float = 0.0003
    delta: float = 0.5
    needs_budgets = True

    def rewards(self, samples: Samples) -> torch.Tensor:
        """Returns r · clip(α (b − n) + δ, 0, 1), float32 [S]."""
        return samples.rewards * (
            self.alpha * (samples.required_budgets() - samples.lengths) + self.delta
        ).clamp(0, 1)


@dataclass(frozen=True, slots=True)
class Overlong(RewardTerm):
    """Adds DAPO's soft overlong punishment to the reward (arXiv 2503.14476, equation 13).

    The punishment is 0 up to L − c tokens, then ((L − c) − n) / c for n tokens, down to −1 at the limit L.

    Attributes:
        cache: c, the number of tokens before the limit over which the punishment grows.
        limit: L in tokens; null takes ``rollout.max_tokens``.
    """

    cache: int = 64
    limit: int | None = None

    def rewards(self, samples: Samples) -> torch.Tensor:
        """Returns r + clip((L − c − n) / c, −1, 0), float32 [S]."""
        limit = samples.longest if self.limit is None else self.limit
        return samples.rewards + ((limit - self.cache - samples.lengths) / self.cache).clamp(-1, 0)


@dataclass(frozen=True, slots=True)
class Target(RewardTerm):
    """Rewards completions near a target length, which may be longer than usual: (1 − w) r + w s.

    s is LongWriter's length score (Bai et al., arXiv 2408.07055, equation 1). For n tokens and a target of b,
    s is max(0, 1 − (n / b − 1) / 3) above the target and max(0, 1 − (b / n − 1) / 2) below it.

    Attributes:
        weight: w, the weight of the length score.
        tokens: b, the target in tokens; null takes each completion's budget.
    """

    weight: float = 0.5
    tokens: int | None = None

    @property
    def needs_budgets(self) -> bool:  # type: ignore[override]
        """Whether the target is each completion's budget."""
        return self.tokens is None

    def rewards(self, samples: Samples) -> torch.Tensor:
        """Returns (1 − w) r + w s, float32 [S]."""
        lengths = samples.lengths.float().clamp(min=1)
        targets = samples.required_budgets() if self.tokens is None else torch.full_like(lengths, self.tokens)
        above = 1 - (lengths / targets - 1) / 3
        below = 1 - (targets / lengths - 1) / 2
        closeness = torch.where(lengths > targets, above, below).clamp(min=0)
        return (1 - self.weight) * samples.rewards + self.weight * closeness


@dataclass(frozen=True, slots=True)
class Hbpo(RewardTerm):
    """Rewards completions within one of several budgets, and compares groups with a budget's best reward.

    Hierarchical budget policy optimization (Lyu et al., arXiv 2507.15844, section 3 and its reference code).
    Each sample of a group is asked to keep to one of a few budgets. A correct completion of n tokens with a
    budget of b earns min(w cos(π n / 2L) − α |n − b|, w cos(π b / 2L)): within its budget it earns no less
    for being longer than others, beyond it less. A wrong completion earns 0.

    The term adds to the group's advantages the difference between the mean reward of the samples with the
    same budget and the most that this budget can earn, w cos(π b / 2L). The reference code adds this
    difference twice; here it counts once, as in the paper.

    Attributes:
        scale: w, the reward's scale.
        alpha: α, the penalty for each token of difference from the budget; null takes 1 / L.
        limit: L in tokens; null takes ``rollout.max_tokens``.
    """

    scale: float = 4.0
    alpha: float | None = None
    limit: int | None = None
    needs_budgets = True
    needs_group = True

    def _cosine_reward(self, tokens: torch.Tensor, samples: Samples) -> torch.Tensor:
        """Returns w cos(π n / 2L) of token counts n, the most that a budget of n tokens can earn."""
        limit = samples.longest if self.limit is None else self.limit
        return self.scale * torch.cos(math.pi * tokens.float() / (2 * limit))

    def rewards(self, samples: Samples) -> torch.Tensor:
        """Returns min(w cos(π n / 2L) − α |n − b|, w cos(π b / 2L)), or 0 if wrong or over L; float32 [S]."""
        limit = samples.longest if self.limit is None else self.limit
        alpha = 1 / limit if self.alpha is None else self.alpha
        budgets = samples.required_budgets()
        earned = self._cosine_reward(samples.lengths, samples) - alpha * (samples.lengths - budgets).abs()
        earned = torch.minimum(earned, self._cosine_reward(budgets, samples))
        return torch.where(samples.correct & (samples.lengths <= limit), earned, torch.zeros_like(earned))

    def advantages(self, samples: Samples) -> torch.Tensor | None:
        """Returns the mean reward of the samples with the same budget minus w cos(π b / 2L), float32 [S]."""
        budgets, rewards = samples.grouped(samples.required_budgets()), samples.grouped(samples.rewards)
        same_budget = (budgets[:, :, None] == budgets[:, None, :]).float()
        mean = (same_budget * rewards[:, None, :]).sum(-1) / same_budget.sum(-1)
        return mean.flatten() - self._cosine_reward(samples.required_budgets(), samples)


@dataclass(frozen=True, slots=True)
class Linear(RewardTerm):
    """Subtracts the naive length penalty, r − α n / L, from correct and wrong completions alike.

    The baseline that the other terms are measured against. It can reward a policy for writing nothing (see
    the papers of GRPO-λ and HBPO); `paceline.rl.monitoring.collapse_guard` reports such a collapse.

    Attributes:
        alpha: α, the penalty of a completion of the maximum length.
    """

    alpha: float = 0.5

    def rewards(self, samples: Samples) -> torch.Tensor:
        """Returns r − α n / L, float32 [S], for n tokens and a maximum of L."""
        return samples.rewards - self.alpha * samples.lengths / samples.longest
