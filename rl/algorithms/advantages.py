"""From rewards to the advantage of each token, as the recipe's algorithm has it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from paceline.rl.algorithms.grpo import group_advantages
from paceline.rl.algorithms.kl import estimate_kl
from paceline.rl.algorithms.ppo import generalised_advantages
from paceline.rl.algorithms.reinforce_pp import normalise, rewards_to_go
from paceline.rl.algorithms.rloo import leave_one_out_advantages
from paceline.rl.algorithms.tree import tree_advantages
from paceline.rl.config.critic import CriticConfig
from paceline.rl.config.update import UpdateConfig


def uniform_groups(rewards: Sequence[float], group_size: int) -> set[int]:
    """Groups whose samples all have one reward: their advantages are zero, and nothing is learned from
    them.
    """
    groups = [rewards[at : at + group_size] for at in range(0, len(rewards), group_size)]
    return {number for number, group in enumerate(groups) if max(group) - min(group) < 1e-6}


def penalties(
    config: UpdateConfig,
    coefficient: float,
    logprobs: Sequence[torch.Tensor],
    reference: Sequence[torch.Tensor] | None,
) -> list[torch.Tensor]:
    """What the KL to the reference takes from each token's reward: zeros unless ``update.kl_in`` is
    ``reward``.

    Args:
        config: The recipe's update section.
        coefficient: β.
        logprobs: float32 [L_i], each completion's, of the policy that drew it.
        reference: float32 [L_i], of the reference; None where there is none.

    Returns:
        float32 [L_i] each.
    """
    if config.kl_in != "reward" or reference is None:
        return [torch.zeros(len(drawn)) for drawn in logprobs]
    pairs = zip(logprobs, reference, strict=True)
    return [coefficient * estimate_kl(drawn, base, config.kl) for drawn, base in pairs]


def token_advantages(
    config: UpdateConfig,
    group_size: int,
    rewards: Sequence[float],
    taken: Sequence[torch.Tensor],
    total: Callable[[torch.Tensor], torch.Tensor],
    paths: Sequence[Sequence[int]] | None = None,
) -> list[torch.Tensor]:
    """Advantages by ``update.advantage``.

    Args:
        config: The recipe's update section.
        group_size: Samples of a prompt, adjacent.
        rewards: Of each completion.
        taken: float32 [L_i], from `penalties`.
        total: Sums a tensor over ranks.
        paths: Segments of each completion, where completions share beginnings.

    Returns:
        float32 [L_i] each.

    Raises:
        ValueError: for ``gae``, which needs a critic (`critic_advantages`).
    """
    if config.advantage == "gae":
        raise ValueError("advantages by gae need a critic's values")
    if config.advantage == "reinforce_pp":
        return normalise([rewards_to_go(r, p) for r, p in zip(rewards, taken, strict=True)], total)
    left = torch.tensor([r - float(p.sum()) for r, p in zip(rewards, taken, strict=True)])
    if config.advantage == "rloo":
        whole = leave_one_out_advantages(left, group_size)
    elif config.advantage == "tree":
        assert paths is not None
        whole = tree_advantages(left, paths, group_size, config.scale_by_std)
    else:
        whole = group_advantages(left, group_size, config.scale_by_std)
    return [torch.full((len(p),), float(a)) for a, p in zip(whole, taken, strict=True)]


def critic_advantages(
    critic: CriticConfig,
    rewards: Sequence[float],
    taken: Sequence[torch.Tensor],
    values: Sequence[torch.Tensor],
    total: Callable[[torch.Tensor], torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """PPO's: generalised advantages, normalised over the whole batch, and the returns that the critic learns.

    Args:
        critic: The recipe's critic section.
        rewards: Of each completion; it comes with the last token.
        taken: float32 [L_i], from `penalties`.
        values: float32 [L_i], the critic's.
        total: Sums a tensor over ranks.

    Returns:
        Advantages and returns, float32 [L_i] each.
    """
    advantages, returns = [], []
    for reward, penalty, value in zip(rewards, taken, values, strict=True):
        each = -penalty
        each[-1:] += reward
        a, r = generalised_advantages(each, value, critic.gamma, critic.gae_lambda)
        advantages.append(a)
        returns.append(r)
    return normalise(advantages, total), returns
