"""A reward of entropies: brevity without a length to aim at."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.rl.rewards.terms import RewardTerm, Samples


@dataclass(frozen=True, slots=True)
class Pear(RewardTerm):
    """Phase-entropy-aware reward (Huang et al., arXiv 2510.08026): a correct completion's reward is
    multiplied by 1 − P, with P = max(0, mean entropy while thinking − α × mean entropy of the answer), at
    most 1; a wrong one's reward stays.

    Entropy and length go together, so penalising a wandering mind shortens it; uncertainty in the answer is
    forgiven. A completion without the answer's marker thought to its end.

    Attributes:
        alpha: α, how much of the answer's entropy is let off.
        weight: Of P, for policies whose entropies are far from 1 nat; 1 as published.
    """

    alpha: float = 1.0
    weight: float = 1.0
    needs_entropies = True

    def rewards(self, samples: Samples) -> torch.Tensor:
        if samples.entropies is None or samples.answers is None:
            raise ValueError("this reward reads the policy's entropies, which were not collected")
        penalties = torch.stack(
            [self._penalty(e, a) for e, a in zip(samples.entropies, samples.answers, strict=True)]
        )
        return torch.where(samples.correct, samples.rewards * (1 - penalties), samples.rewards)

    def _penalty(self, entropies: torch.Tensor, answer: int) -> torch.Tensor:
        thinking, saying = (
            part.mean() if len(part) else torch.zeros(()) for part in (entropies[:answer], entropies[answer:])
        )
        return (self.weight * (thinking - self.alpha * saying)).clamp(0, 1)
