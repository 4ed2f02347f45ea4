"""Length-aware rewards of a completion among the samples of its prompt."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from paceline.rl.rewards.terms import RewardTerm, Samples


@dataclass(frozen=True, slots=True)
class GrpoLambda(RewardTerm):
    """GRPO-λ (Dai et al., arXiv 2505.18086): a length penalty only where a group is mostly right.

    Of the step's groups, the share λ with the highest correct ratio, and those that equal the last of them,
    are trained for
    brevity: a correct sample gets 1 − α σ((n − mean) / std), mean and standard deviation over the group's
        correct lengths (the
    penalty of Arora and Zanette, arXiv 2502.04463, equation 2). The others keep plain rewards: where a
    problem is still hard, length is not what to save on. A group without a correct sample is never penalised.

    Attributes:
        share: λ.
        alpha: α.
    """

    share: float = 0.2
    alpha: float = 0.2
    needs_group = True

    def rewards(self, samples: Samples) -> torch.Tensor:
        of_group = samples.grouped(samples.correct).mean(1)
        step = of_group if samples.ratios is None else samples.ratios
        threshold = step.sort(descending=True).values[max(math.ceil(self.share * len(step)), 1) - 1]
        brief = ((of_group >= threshold) & (of_group > 0)).repeat_interleave(samples.group_size)
        shortened = samples.rewards * (1 - self.alpha * torch.sigmoid(_standardised(samples)))
        return torch.where(brief & samples.correct, shortened, samples.rewards)


def _standardised(samples: Samples) -> torch.Tensor:
    """float32 [S], (length − mean) / std of the group's correct lengths; 0 where those do not differ."""
    lengths, correct = samples.grouped(samples.lengths), samples.grouped(samples.correct)
    count = correct.sum(1, keepdim=True).clamp(min=1)
    mean = (lengths * correct).sum(1, keepdim=True) / count
    std = (((lengths - mean).square() * correct).sum(1, keepdim=True) / count).sqrt()
    return torch.where(
        std > 1e-6, (lengths - mean) / std.clamp(min=1e-6), torch.zeros_like(lengths)
    ).flatten()


@dataclass(frozen=True, slots=True)
class ShorterBetter(RewardTerm):
    """α r − β |n − n*|, where n* is the length of the group's shortest correct sample, or the group's mean
    length where none is correct (Yi et al., arXiv 2504.21370, equations 2 and 3): a policy that cannot solve
    a problem is not taught to be brief on it.

    Attributes:
        alpha: α, of the task's reward.
        beta: β, for each token beside n*.
    """

    alpha: float = 2.0
    beta: float = 0.001
    needs_group = True

    def rewards(self, samples: Samples) -> torch.Tensor:
        lengths, correct = samples.grouped(samples.lengths), samples.grouped(samples.correct) > 0
        shortest = lengths.masked_fill(~correct, float("inf")).amin(1, keepdim=True)
        optimal = torch.where(shortest.isfinite(), shortest, lengths.mean(1, keepdim=True))
        return self.alpha * samples.rewards - self.beta * (lengths - optimal).abs().flatten()


@dataclass(frozen=True, slots=True)
class Alp(RewardTerm):
    """Adaptive length penalty: r − β n max(p, 1 / K), with p the group's correct ratio and K its size (Xiang
    et al., arXiv 2506.05256, equation 2): a token costs the more, the easier the prompt.

    Attributes:
        beta: β.
    """

    beta: float = 1e-7
    needs_group = True

    def rewards(self, samples: Samples) -> torch.Tensor:
        solved = samples.correct_ratios().clamp(min=1 / samples.group_size)
        return samples.rewards - self.beta * samples.lengths * solved
