"""A length-aware reward that reads the policy's entropies and needs no target length."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.rl.rewards.terms import RewardTerm, Samples


@dataclass(frozen=True, slots=True)
class Pear(RewardTerm):
    """Multiplies a correct completion's reward by 1 − P, where P grows with the entropy while thinking.

    Phase-entropy-aware reward (Huang et al., arXiv 2510.08026): P = w (mean entropy while thinking − α × mean
    entropy of the answer), clipped to [0, 1], with w = 1 in the paper. A wrong completion keeps its reward.

    Entropy and length are correlated, so penalising entropy while thinking shortens completions, while
    uncertainty in the answer is not penalised. A completion without the answer marker counts as thinking
    throughout.

    Attributes:
        alpha: α, how much of the answer's entropy is subtracted.
        weight: w, for policies whose entropies are far from 1 nat; 1 as published.
    """

    alpha: float = 1.0
    weight: float = 1.0
    needs_entropies = True

    def rewards(self, samples: Samples) -> torch.Tensor:
        """Returns r (1 − P) for correct completions, else r; float32 [S].

        Raises:
            ValueError: If entropies or answers were not collected.
        """
        if samples.entropies is None or samples.answers is None:
            raise ValueError(
                "entropies and answers are missing, and pear reads both; collect entropies and pass answers"
            )
        penalties = torch.stack(
            [
                self._penalty(entropies, answer)
                for entropies, answer in zip(samples.entropies, samples.answers, strict=True)
            ]
        )
        return torch.where(samples.correct, samples.rewards * (1 - penalties), samples.rewards)

    def _penalty(self, entropies: torch.Tensor, answer: int) -> torch.Tensor:
        """Returns P of a completion, a scalar, from its entropies [L_i] and its answer's first index."""
        thinking, answering = (
            phase.mean() if len(phase) else torch.zeros(())
            for phase in (entropies[:answer], entropies[answer:])
        )
        return (self.weight * (thinking - self.alpha * answering)).clamp(0, 1)
