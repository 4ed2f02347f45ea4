"""The ``update`` section: the algorithm, its loss and its optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class UpdateConfig:
    """The policy update.

    The defaults are GRPO with DAPO's token-level loss; configs/ has a recipe for each algorithm.
    """

    lr: float = 1e-6
    """AdamW's peak learning rate; above 0."""

    weight_decay: float = 0.0
    """AdamW's decoupled weight decay; at least 0."""

    grad_clip: float = 1.0
    """Norm to which the gradient of an optimizer step is clipped; above 0."""

    schedule: Literal["constant", "linear", "cosine", "rex"] = "constant"
    """Schedule of the learning rate over the run's steps, after the warm-up: ``constant``, or decaying
    towards zero as ``linear``, ``cosine`` or ``rex`` (arXiv 2107.04197)."""

    lr_warmup_steps: int = 1
    """RL steps over which the learning rate rises linearly; with 1 or less the first step has the full
    rate."""

    minibatches: int = 1
    """Number of optimizer steps for each batch of rollouts; at least 1."""

    tokens_per_microbatch: int = 2048
    """Number of tokens packed into one forward and backward pass; fewer take less memory."""

    advantage: str = "group"
    """Estimator of the advantages, a name in `paceline.rl.algorithms.advantages.ADVANTAGES`. ``group``:
    reward minus the group's mean (GRPO, arXiv 2402.03300). ``rloo``: reward minus the mean of the group's
    other samples (RLOO, arXiv 2402.14740). ``tree``: reward minus the mean of each set of samples with a
    shared prefix, averaged over these sets (TreePO, arXiv 2508.17445); needs ``rollout.tree``. ``brpo``:
    advantages of the parts of a thought between budgets, from the answers given there (AnytimeReasoner, arXiv
    2505.13438); needs ``length.anytime``. ``reinforce_pp``: no groups, normalized over the batch
    (REINFORCE++, arXiv 2501.03262). ``gae``: per token, with a critic (PPO, arXiv 1707.06347)."""

    ratio: str = "token"
    """Policy loss, a name in `paceline.rl.algorithms.policy_losses.POLICY_LOSSES`. Losses are named after the
    importance ratio that they clip: that of each ``token``, or of the ``sequence``, length-normalized (GSPO,
    arXiv 2507.18071, equation 7; it clips within a few 1e-4)."""

    clip_low: float = 0.2
    """Distance below 1 at which the ratio is clipped; at least 0."""

    clip_high: float = 0.2
    """Distance above 1 at which the ratio is clipped; DAPO's clip-higher takes 0.28 (arXiv 2503.14476,
    section 3.1)."""

    aggregate: Literal["token", "sequence", "constant"] = "token"
    """What has equal weight in the loss. ``token``: every token (DAPO, arXiv 2503.14476, section 3.3).
    ``sequence``: every completion (GRPO as published, arXiv 2402.03300, equation 3). ``constant``: every
    token, with a completion's sum divided by ``rollout.max_tokens`` (Dr. GRPO, arXiv 2503.20783)."""

    scale_by_std: bool = True
    """Divide advantages by the group's standard deviation. False (Dr. GRPO, arXiv 2503.20783) is allowed only
    with ``advantage: group``."""

    kl_coef: float = 0.0
    """Coefficient β of the KL penalty to the initial policy; at least 0. 0 keeps no reference model."""

    kl: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of the KL penalty, with d = log π − log π_ref: ``k1`` = d, ``k2`` = d² / 2, ``k3`` = e^(−d) −
    1 + d (Schulman, "Approximating KL divergence", 2020). ``k1`` only with ``kl_in: reward``: in the loss its
    gradient is zero on average."""

    kl_in: Literal["loss", "reward"] = "loss"
    """Where the KL penalty is applied: in the ``loss``, or in the ``reward`` of each token."""

    kl_target: float | None = None
    """KL per token, in nats, to which ``kl_coef`` is adapted after each step (arXiv 1909.08593, section 2.2);
    above 0. Null keeps ``kl_coef`` fixed."""

    entropy_coef: float = 0.0
    """Coefficient of the entropy bonus."""

    importance: Literal["none", "token", "sequence"] = "none"
    """Correction of the training–inference mismatch by truncated importance sampling, with the ratio
    π_trainer / π_engine of each ``token`` or of the whole ``sequence``; ``none`` only measures the
    mismatch."""

    importance_cap: float = 2.0
    """Largest importance weight; at least 1."""

    mask_mastered: float | None = None
    """Probability, in (0, 1), from which a token of positive advantage is left out of the loss while entropy
    is below ``mastered_below`` (well-mastered positive tokens: UloRL, arXiv 2507.19766, section 3.3, with
    0.99). Null leaves none out."""

    mastered_below: float = 0.2
    """Entropy per token, in nats, below which ``mask_mastered`` applies; above 0."""

    mask_truncated: bool = False
    """Leave completions that were cut at ``rollout.max_tokens`` out of the loss (overlong filtering: DAPO,
    arXiv 2503.14476)."""
