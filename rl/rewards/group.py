"""Length-aware rewards that compare a completion with the other samples of its prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from paceline.rl.rewards.terms import RewardTerm, Samples


@dataclass(frozen=True, slots=True)
class GrpoLambda(RewardTerm):
    """Penalises length only in groups that are mostly correct (GRPO-λ, Dai et al., arXiv 2505.18086).

    The fraction λ of the step's groups with the highest ratio of correct samples, and those tied with the
    last of them, are trained for brevity: a correct sample earns 1 − α σ((n − mean) / std), with mean and
    standard deviation over the group's correct lengths (the penalty of Arora and Zanette, arXiv 2502.04463,
    equation 2). The other groups keep their plain rewards: while a problem is still hard, length is not worth
    saving. A group without a correct sample is never penalised.

    Attributes:
        share: λ, the fraction of groups that are trained for brevity.
        alpha: α, the weight of the penalty.
    """

    share: float = 0.2
    alpha: float = 0.2
    needs_group = True

    def rewards(self, samples: Samples) -> torch.Tensor:
        """Returns float32 [S]: r (1 − α σ((n − mean) / std)) if correct in a selected group, else r."""
        ratios = samples.grouped(samples.correct).mean(1)
        step_ratios = ratios if samples.ratios is None else samples.ratios
        last_selected = max(math.ceil(self.share * len(step_ratios)), 1) - 1
        threshold = step_ratios.sort(descending=True).values[last_selected]
        selected = ((ratios >= threshold) & (ratios > 0)).repeat_interleave(samples.group_size)
        penalised = samples.rewards * (1 - self.alpha * torch.sigmoid(_standardised(samples)))
        return torch.where(selected & samples.correct, penalised, samples.rewards)


def _standardised(samples: Samples) -> torch.Tensor:
    """Returns float32 [S], (n − mean) / std over the correct lengths of each group; 0 if these are equal."""
    lengths, correct = samples.grouped(samples.lengths), samples.grouped(samples.correct)
    count = correct.sum(1, keepdim=True).clamp(min=1)
    mean = (lengths * correct).sum(1, keepdim=True) / count
    std = (((lengths - mean).square() * correct).sum(1, keepdim=True) / count).sqrt()
    return torch.where(
        std > 1e-6, (lengths - mean) / std.clamp(min=1e-6), torch.zeros_like(lengths)
    ).flatten()


@dataclass(frozen=True, slots=True)
class ShorterBetter(RewardTerm):
    """Rewards being near the length n* of the group's shortest correct sample: α r − β |n − n*|.

    Yi et al., arXiv 2504.21370, equations 2 and 3. If no sample of the group is correct, n* is the group's
    mean length, so a policy that cannot solve a problem is not taught to be brief on it.

    Attributes:
        alpha: α, the weight of the task's reward.
        beta: β, the penalty for each token of difference from n*.
    """

    alpha: float = 2.0
    beta: float = 0.001
    needs_group = True

    def rewards(self, samples: Samples) -> torch.Tensor:
        """Returns α r − β |n − n*|, float32 [S]."""
        lengths, correct = samples.grouped(samples.lengths), samples.grouped(samples.correct) > 0
        shortest = lengths.masked_fill(~correct, float("inf")).amin(1, keepdim=True)
        optimal = torch.where(shortest.isfinite(), shortest, lengths.mean(1, keepdim=True))
        return self.alpha * samples.rewards - self.beta * (lengths - optimal).abs().flatten()


@dataclass(frozen=True, slots=True)
class Alp(RewardTerm):
    """Charges more for each token the easier the prompt: r − β n max(p, 1 / K).

    Adaptive length penalty (Xiang et al., arXiv 2506.05256, equation 2); p is the fraction of correct samples
    in the group and K the group's size.

    Attributes:
        beta: β, the penalty for each token of a prompt whose samples are all correct.
    """

    beta: float = 1e-7
    needs_group = True

    def rewards(self, samples: Samples) -> torch.Tensor:
        """Returns r − β n max(p, 1 / K), float32 [S]."""
        ratios = samples.correct_ratios().clamp(min=1 / samples.group_size)
        return samples.rewards - self.beta * samples.lengths * ratios
