"""The ``critic`` section: PPO's value model."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CriticConfig:
    """PPO's critic (Schulman et al., arXiv 1707.06347), trained with ``update.advantage: gae``.

    It is a decoder initialized from the policy, with a scalar head that starts at zero.
    """

    lr: float = 1e-5
    """AdamW's learning rate, constant over the run; above 0."""

    grad_clip: float = 1.0
    """Norm to which the gradient is clipped; above 0."""

    gamma: float = 1.0
    """Discount γ of later rewards, in (0, 1]; 1 does not discount."""

    gae_lambda: float = 0.95
    """λ of generalized advantage estimation, in [0, 1] (Schulman et al., arXiv 1506.02438, equation 16): 1
    has least bias, 0 has least variance."""

    value_clip: float | None = 0.2
    """Largest distance between a clipped value and the value before the update; null does not clip. The loss
    is the larger of the clipped and the unclipped squared error."""

    warmup_steps: int = 0
    """RL steps at the start of the run in which only the critic is trained and the policy stays as it is."""
