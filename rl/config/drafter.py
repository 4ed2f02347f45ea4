"""The ``drafter`` section: the EAGLE-3 drafter, its training objective, its data, and when it is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """The EAGLE-3 drafter (arXiv 2503.01840) and its training during the run."""

    start: str | None = None
    """Directory of a drafter to start from, as written by ``paceline warmup`` or ``paceline export``. Null
    creates one: after the first step, or before it with ``warmup_minutes``."""

    warmup_minutes: float | None = None
    """Minutes, sampling and training together, that are spent on a first drafter before the run, if ``start``
    is null. The drafter learns from the policy's own samples and is cached for other runs of the recipe. Null
    trains none before the run."""

    draft_vocab_size: int = 4096
    """Number of tokens that the drafter can draft, from 1 to the policy's vocabulary. The most frequent
    tokens of the first step's rollouts are chosen, or those of ``start``, whose number must equal this
    key."""

    tap_layers: tuple[int, ...] = ()
    """Three policy layers, in ascending order, whose inputs the drafter reads; empty takes layers 2, L // 2
    and L − 3 of L. They must be those of ``start``."""

    vocabulary_every: int = 0
    """RL steps between two choices of the draft vocabulary, each from that step's rollouts; 0 keeps the first
    choice."""

    schedule: Literal["idle", "always", "never"] = "idle"
    """When the drafter is trained. ``idle``: only while other ranks still decode, so that no step waits for
    it. ``always``: all ``passes`` after each rank's rollouts, even if others wait; for runs with one rank, or
    if acceptance matters more than time. ``never``: the drafter stays as it is."""

    least_idle_ranks: int = 1
    """Number of ranks that must be idle before those train, with ``schedule: idle``; at least 1."""

    max_slowdown: float = 0.15
    """Largest share, at least 0, by which training on idle ranks may slow the decode steps of ranks on the
    same machine, with ``schedule: idle``. Short pauses of training measure it. Where it is higher by more
    than two standard errors, no more is trained in this step and in those after it, until the measurements
    are eight steps old and are made anew. 0 stops training once any slowdown is certain. It is also at most
    half of the share of the decoding time that good drafts would save at the batch sizes of the run; where
    that is less than 10 %, nothing is trained beside decoding ranks."""

    lr: float = 1e-4
    """AdamW's learning rate; above 0. A warm-up before the run starts at three times this rate and ends at
    0.3 times."""

    lr_schedule: Literal["constant", "linear", "cosine", "rex"] = "constant"
    """Schedule of ``lr`` over the run's steps; the choices are those of ``update.schedule``."""

    ensemble: tuple[float, ...] = (1.0,)
    """Learning rates of drafters that are trained side by side, as multiples of ``lr``, each above 0; the
    drafter with the best recent acceptance is used (OnlineSpec, arXiv 2603.12617). They share the training
    time, and each takes the memory of a drafter and its optimizer."""

    optimistic: bool = False
    """Keep the weights one step ahead of the optimizer's: they move by 2 d_t − d_{t−1}, where d_t is AdamW's
    step (optimistic online learning, as in OnlineSpec, arXiv 2603.12617)."""

    loss: str = "fkl"
    """Distillation loss between the policy's distribution p and the drafter's q, a name in
    `paceline.drafter_trainer.objective.losses.LOSSES` or ``length``. ``fkl``: cross-entropy −Σ p log q, the
    gradient of the forward KL (EAGLE-3, arXiv 2503.01840). ``rkl``: reverse KL; ``jsd``: Jensen–Shannon (both
    DistillSpec, arXiv 2310.08461). ``tvd``: total variation, 1 − Σ min(p, q), which is the rejection
    probability (arXiv 2211.17192, theorem 3.5). ``tvd++``: the same with a normalized reward (arXiv
    2403.00858). ``log_acceptance``: −log Σ min(p, q) (LK losses, arXiv 2602.23881). ``length``: the negative
    expected acceptance length of the whole draft."""

    unroll: int = 3
    """Number of draft positions trained on, each fed with the drafter's output at the one before
    (training-time test; EAGLE-3, arXiv 2503.01840, section 3.2); at least 1."""

    parallel_positions: int = 0
    """Number of draft positions that the drafter learns to draft in one pass, for the ``parallel`` drafter of
    ``speculation.drafters`` (P-EAGLE, arXiv 2602.01469); 0 or at least 2. They are trained beside the
    ``unroll`` positions of drafts that take a pass a token; with ``unroll: 1`` instead of them."""

    decay: float = 0.8
    """Weight of each draft position relative to the one before. ``loss: length`` does not use it."""

    mask_top: int | None = None
    """Leave out a draft position, and those after it, if the policy's likeliest token is not among this many
    of the drafter's likeliest (GRIFFIN, arXiv 2502.11018); at least 1. Null leaves none out."""

    on_policy: float = 0.0
    """Weight of the loss at the position after a rejected draft token, where the policy's distribution is
    known from verification (on-policy distillation: DistillSpec, arXiv 2310.08461); 0 leaves it out. Not with
    ``loss: length``."""

    feedback_only: bool = False
    """Train only on positions where verification rejected a draft token (online speculative decoding, arXiv
    2310.07177). Not with ``loss: length``."""

    tokens_per_microbatch: int = 256
    """Number of completion tokens in one optimizer step of the drafter; at least 16. Longer completions are
    cut into pieces of at most 512 tokens."""

    context_tokens: int = 512
    """Number of tokens before a piece of a completion that the drafter attends to while it is trained on the
    piece, beside the first four of the text; at least 0. Only their keys and values are computed: on a CPU,
    512 of them for each 256 tokens took a seventh of the time."""

    random_positions: bool = False
    """Move each piece, in training, by a random distance from the first four tokens of its text, within
    ``rollout.max_context``, so that distances are met that are longer than the completions so far
    (anchor-offset indices: LongSpec, arXiv 2502.17421)."""

    passes: int = 2
    """Largest number of passes over a step's rollouts; at least 1."""

    judge_every: int = 8
    """Optimizer steps between two comparisons with the drafter in use, on held-out sequences. New weights are
    used only if their expected acceptance length is higher; at least 1."""

    held_out_every: int = 4
    """Every how many groups of a rank one is held out from training, to compare drafters on it for three
    steps; 0 holds out none and uses every update, 1 is not allowed."""

    previous_steps: int = 4
    """Number of earlier steps whose long sequences, those of at least their step's median length, are kept
    for training. Ranks that become idle early have mostly short ones (TLT, arXiv 2511.16665)."""

    previous_share: float = 0.5
    """Share of a micro-batch that comes from earlier steps, in [0, 1)."""

    age_decay: float = 0.8
    """Factor by which a sequence's weight shrinks with each step of its age, in (0, 1]."""

    reward_weight: float = 0.0
    """How much more completions with a high reward count, in [0, 1] (ReSpec's reward-weighted distillation).
    A completion's weight is 1 + 2 · ``reward_weight`` · (r − mean) / (max − min) over the step's rewards, at
    least 0; with 0 all weights are 1."""

    snapshots: int = 2
    """Number of drafters of past steps to keep in the run's ``drafters`` directory; 0 writes none between
    checkpoints."""

    memory_tokens: int = 65536
    """Number of tokens whose traces (hidden states for the drafter's training) a rank holds in memory, beside
    the held-out ones."""

    disk_tokens: int = 0
    """Number of tokens whose traces a rank writes to disk once memory is full; the rest is dropped."""
