"""The update section: the algorithm, its loss and its optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class UpdateConfig:
    """The policy update. The defaults are GRPO with DAPO's token-level loss; configs/ has a recipe of each
    algorithm.
    """

    lr: float = 1e-6
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    schedule: Literal["constant", "linear", "cosine", "rex"] = "constant"
    """Of the learning rate over the run's steps: ``constant``, ``linear``, ``cosine`` or ``rex``."""
    lr_warmup_steps: int = 1
    """RL steps over which the learning rate rises linearly."""
    minibatches: int = 1
    """Optimizer steps for each batch of rollouts."""
    tokens_per_microbatch: int = 2048
    """Tokens packed into one forward."""
    advantage: Literal["group", "rloo", "tree", "brpo", "reinforce_pp", "gae"] = "group"
    """``group`` (GRPO: reward less the group's mean), ``rloo`` (less the mean of the group's others),
    ``tree`` (TreePO: reward less the mean of each set of samples that share a beginning, averaged), ``brpo``
    (of stretches of thought, by the answers that cutting there gives: ``length.anytime``), ``reinforce_pp``
    (no groups: normalised over the whole batch) or ``gae`` (PPO: of each token, by a critic). lr,
    weight_decay, grad_clip: Of AdamW."""
    ratio: Literal["token", "sequence"] = "token"
    """What is clipped: the ratio of each ``token``, or of the ``sequence``, length-normalised (GSPO; clips of
    a few 1e-4). clip_low, clip_high: The clip of the ratio below and above 1 (DAPO's clip-higher: 0.2 and
    0.28)."""
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregate: Literal["token", "sequence", "constant"] = "token"
    """What weighs alike in the loss: every ``token`` (DAPO), every ``sequence`` (GRPO as published), or
    ``constant``: tokens over the longest possible completion (Dr. GRPO)."""
    scale_by_std: bool = True
    """Divide ``group`` advantages by the group's standard deviation (Dr. GRPO does not)."""
    kl_coef: float = 0.0
    """Weight of the KL to the starting policy; 0 keeps no reference model."""
    kl: Literal["k1", "k2", "k3"] = "k3"
    """Its estimate, ``k1``, ``k2`` or ``k3``."""
    kl_in: Literal["loss", "reward"] = "loss"
    """Where it counts: in the ``loss``, or in the ``reward`` of each token."""
    kl_target: float | None = None
    """KL of a token that ``kl_coef`` is adapted to; null keeps it."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    importance: Literal["none", "token", "sequence"] = "none"
    """Corrects for what the engine drew under slightly other numbers than the trainer computes, by truncated
    importance sampling of each ``token`` or ``sequence``; ``none`` only measures it."""
    importance_cap: float = 2.0
    """Largest weight."""
    mask_mastered: float | None = None
    """Leave tokens of positive advantage out of the loss that the policy says at least so probably, while its
    entropy is below ``mastered_below`` (UloRL's well-mastered positive tokens; 0.99 there); null leaves none
    out."""
    mastered_below: float = 0.2
    """Nats."""
    mask_truncated: bool = False
    """Leave completions that were cut at ``max_tokens`` out of the loss (DAPO's overlong filtering)."""
