"""The drafter section: its shape, its training, and when it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """The EAGLE-3 drafter and its training."""

    start: str | None = None
    """Directory of a drafter to start from, as paceline warmup and paceline export write it; null makes one
    after the first step, or before it by ``warmup_minutes``."""
    warmup_minutes: float | None = None
    """Without ``start``, make a first drafter from the policy's own samples before the run, for so many
    minutes of sampling and training; it is cached, and other runs of the recipe find it. Null makes none."""
    draft_vocab_size: int = 4096
    """Tokens it can draft; chosen by frequency in the first step's rollouts, or those of ``start``, which
    must be as many."""
    tap_layers: tuple[int, ...] = ()
    """Three layers whose inputs it reads, in order; empty takes 2, L // 2 and L − 3 of the policy's L layers.
    Those of ``start`` must be these."""
    vocabulary_every: int = 0
    """RL steps after which they are chosen anew from the step's rollouts; 0 keeps them."""
    schedule: Literal["idle", "always", "never"] = "idle"
    """``idle`` trains only while other ranks still decode, so that no step waits; ``always`` goes through the
    passes after each rank's rollouts, whoever waits: for one rank alone, or where acceptance matters more
    than time; ``never`` keeps the drafter as it is."""
    least_idle_ranks: int = 1
    """Idle ranks from which on those train."""
    lr: float = 1e-4
    """AdamW's learning rate; warmup_drafter.py begins with three times that."""
    lr_schedule: Literal["constant", "linear", "cosine", "rex"] = "constant"
    """Of it over the run's steps, as ``update.schedule``."""
    ensemble: tuple[float, ...] = (1.0,)
    """Learning rates of drafters that are trained side by side, as multiples of ``lr``; the one that has
    lately done best is proposed (OnlineSpec). They share the time for training; each takes the memory of a
    drafter and its optimizer."""
    optimistic: bool = False
    """Updates on 2 g_t − g_{t−1} (OnlineSpec)."""
    loss: Literal["fkl", "rkl", "jsd", "tvd", "tvd++", "log_acceptance", "length"] = "fkl"
    """``fkl``, ``rkl``, ``jsd``, ``tvd``, ``tvd++``, ``log_acceptance`` or ``length``."""
    unroll: int = 3
    """Draft positions trained on (training-time test)."""
    decay: float = 0.8
    """Weight of each further position relative to the one before."""
    mask_top: int | None = None
    """Leave out draft positions whose likeliest token under the policy is not among the drafter's so many
    likeliest (GRIFFIN); null leaves none out."""
    on_policy: float = 0.0
    """Weight of what the policy says after the drafter's own refused tokens (DistillSpec); 0 leaves it
    out."""
    feedback_only: bool = False
    """Learn only where verification refused a draft (online speculative decoding)."""
    tokens_per_microbatch: int = 256
    """Tokens of one drafter update."""
    passes: int = 2
    """Passes over each step's rollouts, at most."""
    judge_every: int = 8
    """Updates between two judgements on sequences kept back."""
    held_out_every: int = 4
    """Every so many-th group of a rank is kept back; 0 keeps none and serves every update."""
    previous_steps: int = 4
    """How many steps back long sequences are kept."""
    previous_share: float = 0.5
    """Share of a micro-batch from those."""
    age_decay: float = 0.8
    """Weight of a sequence for each step of its age."""
    reward_weight: float = 0.0
    """How much more the completions of high reward count (ReSpec): 0 all alike, 1 from 0 to 2 times."""
    snapshots: int = 2
    """Drafters of past steps to keep in the run's ``drafters``; 0 writes none between checkpoints.
    memory_tokens, disk_tokens: Tokens of traces that a rank holds in memory, and on disk beyond that."""
    memory_tokens: int = 65536
    disk_tokens: int = 0
