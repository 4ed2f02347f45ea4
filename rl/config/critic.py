"""The critic section: PPO's value model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CriticConfig:
    """PPO's critic, for ``update.advantage: gae``: a decoder of the policy's size with a head of its own."""

    lr: float = 1e-5
    grad_clip: float = 1.0
    gamma: float = 1.0
    gae_lambda: float = 0.95
    value_clip: float | None = 0.2
    """How far an update may move a value; null does not limit it."""
    warmup_steps: int = 0
    """RL steps in which the critic alone learns."""
