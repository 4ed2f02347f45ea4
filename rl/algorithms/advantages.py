"""Computes each token's advantage from rewards, by the estimator that ``update.advantage`` names.

A new estimator is a file beside this one with a pure function, and its line in `ADVANTAGES`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from paceline.rl.algorithms.grpo import group_advantages
from paceline.rl.algorithms.kl import estimate_kl
from paceline.rl.algorithms.ppo import generalised_advantages
from paceline.rl.algorithms.reinforce_pp import normalise, rewards_to_go
from paceline.rl.algorithms.rloo import leave_one_out_advantages
from paceline.rl.algorithms.tree import tree_advantages
from paceline.rl.config.critic import CriticConfig
from paceline.rl.config.update import UpdateConfig


@dataclass(frozen=True, slots=True)
class RewardBatch:
    """A rank's completions, with everything that an advantage estimator may read.

    Attributes:
        rewards: Reward of each completion; the samples of a group are adjacent.
        penalties: float32 [L_i] for each completion, the KL penalty of each token.
        group_size: Number of samples of a prompt.
        scale_by_std: Whether to divide by the standard deviation (``update.scale_by_std``).
        sum_over_ranks: Function that sums a tensor over ranks; collective.
        paths: Segments of each completion; None unless completions share prefixes (``rollout.tree``).
    """

    rewards: Sequence[float]
    penalties: Sequence[torch.Tensor]
    group_size: int
    scale_by_std: bool
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]
    paths: Sequence[Sequence[int]] | None = None

    @property
    def net_rewards(self) -> torch.Tensor:
        """float32 [S], the reward of each completion minus the penalties of its tokens."""
        return torch.tensor([r - float(p.sum()) for r, p in zip(self.rewards, self.penalties, strict=True)])

    def per_token(self, advantages: torch.Tensor) -> list[torch.Tensor]:
        """Returns float32 [L_i] for each completion: every token has its completion's advantage.

        Args:
            advantages: float [S], the advantage of each completion.
        """
        return [torch.full((len(p),), float(a)) for a, p in zip(advantages, self.penalties, strict=True)]


AdvantageEstimator = Callable[[RewardBatch], list[torch.Tensor]]


def _tree(batch: RewardBatch) -> list[torch.Tensor]:
    assert batch.paths is not None
    advantages = tree_advantages(batch.net_rewards, batch.paths, batch.group_size, batch.scale_by_std)
    return batch.per_token(advantages)


def _reinforce_pp(batch: RewardBatch) -> list[torch.Tensor]:
    returns = [rewards_to_go(r, p) for r, p in zip(batch.rewards, batch.penalties, strict=True)]
    return normalise(returns, batch.sum_over_ranks)


def _not_from_rewards(reason: str) -> AdvantageEstimator:
    """Registers a name whose advantages cannot be computed from a `RewardBatch`."""

    def estimator(batch: RewardBatch) -> list[torch.Tensor]:
        raise ValueError(reason)

    return estimator


ADVANTAGES: dict[str, AdvantageEstimator] = {
    "group": lambda b: b.per_token(group_advantages(b.net_rewards, b.group_size, b.scale_by_std)),
    "rloo": lambda b: b.per_token(leave_one_out_advantages(b.net_rewards, b.group_size)),
    "tree": _tree,
    "brpo": _not_from_rewards("update.advantage brpo needs scores at budgets: call brpo_advantages"),
    "reinforce_pp": _reinforce_pp,
    "gae": _not_from_rewards("update.advantage gae needs a critic's values: call critic_advantages"),
}


def uniform_groups(rewards: Sequence[float], group_size: int) -> set[int]:
    """Returns the groups whose samples all have the same reward.

    Their advantages are zero, so that nothing is learned from them.
    """
    groups = [rewards[at : at + group_size] for at in range(0, len(rewards), group_size)]
    return {number for number, group in enumerate(groups) if max(group) - min(group) < 1e-6}


def compute_kl_penalties(
    config: UpdateConfig,
    coefficient: float,
    logprobs: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor] | None,
) -> list[torch.Tensor]:
    """Returns the KL penalty that is subtracted from each token's reward.

    It is zero unless ``update.kl_in`` is ``reward``.

    Args:
        config: The recipe's update section.
        coefficient: Coefficient β of the penalty.
        logprobs: float32 [L_i], log-probs of each completion under the policy that sampled it.
        reference: float32 [L_i], log-probs under the reference; None without a reference.

    Returns:
        float32 [L_i] for each completion.
    """
    if config.kl_in != "reward" or reference is None:
        return [torch.zeros(len(policy)) for policy in logprobs]
    pairs = zip(logprobs, reference, strict=True)
    return [coefficient * estimate_kl(policy, base, config.kl) for policy, base in pairs]


def token_advantages(
    config: UpdateConfig,
    group_size: int,
    rewards: Sequence[float],
    penalties: Sequence[torch.Tensor],
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
    paths: Sequence[Sequence[int]] | None = None,
) -> list[torch.Tensor]:
    """Computes the advantage of each token by ``update.advantage``.

    Args:
        config: The recipe's update section.
        group_size: Number of samples of a prompt, which are adjacent.
        rewards: Reward of each completion.
        penalties: float32 [L_i], the KL penalty of each token.
        sum_over_ranks: Function that sums a tensor over ranks.
        paths: Segments of each completion, if completions share prefixes.

    Returns:
        float32 [L_i] for each completion.

    Raises:
        ValueError: The advantages are ``gae``, which needs a critic (`critic_advantages`), or ``brpo``, which
            needs scores at budgets (`brpo_advantages`).
    """
    batch = RewardBatch(rewards, penalties, group_size, config.scale_by_std, sum_over_ranks, paths)
    return ADVANTAGES[config.advantage](batch)


def critic_advantages(
    critic: CriticConfig,
    rewards: Sequence[float],
    penalties: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    sum_over_ranks: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Computes PPO's advantages, normalised over the batch of all ranks, and the critic's targets.

    Args:
        critic: The recipe's critic section.
        rewards: Reward of each completion, given at its last token.
        penalties: float32 [L_i], the KL penalty of each token.
        values: float32 [L_i], the critic's values.
        sum_over_ranks: Function that sums a tensor over ranks.

    Returns:
        Advantages and returns, float32 [L_i] each.
    """
    advantages, returns = [], []
    for reward, penalty, value in zip(rewards, penalties, values, strict=True):
        token_rewards = -penalty
        token_rewards[-1:] += reward
        a, r = generalised_advantages(token_rewards, value, critic.gamma, critic.gae_lambda)
        advantages.append(a)
        returns.append(r)
    return normalise(advantages, sum_over_ranks), returns
