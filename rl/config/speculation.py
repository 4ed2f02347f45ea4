"""The sections of a recipe about drafting: how rollouts are speculated, and how the drafter is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """How rollouts are speculated; every choice is lossless.

    Attributes:
        strategy: ``adaptive``, ``plain``, or one strategy for all steps: ``<drafter>:<depth>`` drafts chains,
            ``<drafter>:<depth>x<width>/<nodes>`` trees of that many nodes, for example ``eagle3:5x4/12``.
        drafters: Which are built; names of `paceline.rollout.drafters.DRAFTERS`.
        arms: Strategies that ``adaptive`` chooses from; empty takes chains and trees of every drafter.
        selection: How it chooses: ``beg`` (ε-greedy) or ``thompson``.
        epsilon: Share of the time that explorations of ``beg`` may lose.
        max_nodes: Most draft tokens of a sequence in a verification.
        tree: Shape of trees: ``dynamic`` (EAGLE-2), ``opt_tree``, ``dyspec`` or ``static``.
        draw: Draft the ``likeliest`` tokens, or draw them, siblings with ``replacement`` or
            ``without_replacement``.
        verifier: Of drawn drafts: ``chain``, ``block``, ``recursive`` or ``spectr``; null takes chain for
            chains and recursive for trees. Chains are covered by all; trees by ``recursive``, and those drawn
            with ``replacement`` also by ``spectr``. The ``stand`` drafter always draws siblings without
            replacement. What a verifier does not cover is refused.
        stop: When chains of model-based drafters end: ``fixed`` (at their depth), ``svip`` or ``specdec``.
        stop_threshold: Of that rule.
        tree_gain: Least expected tokens that another level of an ``opt_tree`` must bring.
        budgets: Draft tokens of the sequences in a batch: ``uniform``, or ``length_aware`` for more where
            more is left to decode.
        eagle3_window: Tokens that the EAGLE-3 drafter attends to at least; null for all.
        composite_match: Tokens of a suffix match from which the composite drafter trusts it.
        clasp_skipped: Layers that CLaSp leaves out, as a share.
        draft_model: Directory or id of the ``draft_model`` drafter's model.
    """

    strategy: str = "adaptive"
    drafters: tuple[str, ...] = ("suffix", "eagle3", "composite")
    arms: tuple[str, ...] = ()
    selection: Literal["beg", "thompson"] = "beg"
    epsilon: float = 0.02
    max_nodes: int = 16
    tree: Literal["dynamic", "opt_tree", "dyspec", "static"] = "dynamic"
    draw: Literal["likeliest", "replacement", "without_replacement"] = "likeliest"
    verifier: Literal["chain", "block", "recursive", "spectr"] | None = None
    stop: Literal["fixed", "svip", "specdec"] = "fixed"
    stop_threshold: float = 0.7
    tree_gain: float = 0.05
    budgets: Literal["uniform", "length_aware"] = "uniform"
    eagle3_window: int | None = None
    composite_match: int = 5
    clasp_skipped: float = 0.4
    draft_model: str | None = None


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """The EAGLE-3 drafter and its training.

    Attributes:
        start: Directory of a drafter to start from, as paceline warmup and paceline export write it; null
            makes one after the first step, or before it by ``warmup_minutes``.
        warmup_minutes: Without ``start``, make a first drafter from the policy's own samples before the run,
            for so many minutes of sampling and training; it is cached, and other runs of the recipe find it.
            Null makes none.
        draft_vocab_size: Tokens it can draft; chosen by frequency in the first step's rollouts, or those of
            ``start``, which must be as many.
        tap_layers: Three layers whose inputs it reads, in order; empty takes 2, L // 2 and L − 3 of the
            policy's L layers. Those of ``start`` must be these.
        vocabulary_every: RL steps after which they are chosen anew from the step's rollouts; 0 keeps them.
        schedule: ``idle`` trains only while other ranks still decode, so that no step waits; ``always`` goes
            through the passes after each rank's rollouts, whoever waits: for one rank alone, or where
            acceptance matters more than time; ``never`` keeps the drafter as it is.
        least_idle_ranks: Idle ranks from which on those train.
        lr: AdamW's learning rate; warmup_drafter.py begins with three times that.
        lr_schedule: Of it over the run's steps, as ``update.schedule``.
        ensemble: Learning rates of drafters that are trained side by side, as multiples of ``lr``; the one
            that has lately done best is proposed (OnlineSpec). They share the time for training; each takes
            the memory of a drafter and its optimizer.
        optimistic: Updates on 2 g_t − g_{t−1} (OnlineSpec).
        loss: ``fkl``, ``rkl``, ``jsd``, ``tvd``, ``tvd++``, ``log_acceptance`` or ``length``.
        unroll: Draft positions trained on (training-time test).
        decay: Weight of each further position relative to the one before.
        mask_top: Leave out draft positions whose likeliest token under the policy is not among the drafter's
            so many likeliest (GRIFFIN); null leaves none out.
        on_policy: Weight of what the policy says after the drafter's own refused tokens (DistillSpec); 0
            leaves it out.
        feedback_only: Learn only where verification refused a draft (online speculative decoding).
        tokens_per_microbatch: Tokens of one drafter update.
        passes: Passes over each step's rollouts, at most.
        judge_every: Updates between two judgements on sequences kept back.
        held_out_every: Every so many-th group of a rank is kept back; 0 keeps none and serves every update.
        previous_steps: How many steps back long sequences are kept.
        previous_share: Share of a micro-batch from those.
        age_decay: Weight of a sequence for each step of its age.
        reward_weight: How much more the completions of high reward count (ReSpec): 0 all alike, 1 from 0 to 2
            times.
        snapshots: Drafters of past steps to keep in the run's ``drafters``; 0 writes none between
            checkpoints.
        memory_tokens, disk_tokens: Tokens of traces that a rank holds in memory, and on disk beyond that.
    """

    start: str | None = None
    warmup_minutes: float | None = None
    draft_vocab_size: int = 4096
    tap_layers: tuple[int, ...] = ()
    vocabulary_every: int = 0
    schedule: Literal["idle", "always", "never"] = "idle"
    least_idle_ranks: int = 1
    lr: float = 1e-4
    lr_schedule: Literal["constant", "linear", "cosine", "rex"] = "constant"
    ensemble: tuple[float, ...] = (1.0,)
    optimistic: bool = False
    loss: Literal["fkl", "rkl", "jsd", "tvd", "tvd++", "log_acceptance", "length"] = "fkl"
    unroll: int = 3
    decay: float = 0.8
    mask_top: int | None = None
    on_policy: float = 0.0
    feedback_only: bool = False
    tokens_per_microbatch: int = 256
    passes: int = 2
    judge_every: int = 8
    held_out_every: int = 4
    previous_steps: int = 4
    previous_share: float = 0.5
    age_decay: float = 0.8
    reward_weight: float = 0.0
    snapshots: int = 2
    memory_tokens: int = 65536
    disk_tokens: int = 0
