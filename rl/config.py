"""A recipe: every key, its type, its default and its meaning, and which values contradict each other."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from rl.errors import UserError
from rl.strict import apply_override, parse
from rl.task_config import TaskConfig
from rollout import Strategy
from rollout.drafters import DRAFTERS, DraftRules
from rollout.trees import MOST_NODES


@dataclass(frozen=True, slots=True)
class WarmupConfig:
    """Supervised warm-up on worked solutions, by ``launch/warmup_policy.py``.

    Attributes:
        examples: Worked solutions, each seen once.
        batch_size: Solutions of one optimizer step.
        lr: Peak learning rate (linear decay to zero, short linear rise).
        seed: Of the examples; they are drawn apart from the RL problems.
    """

    examples: int = 1000
    batch_size: int = 16
    lr: float = 1e-4
    seed: int = 1234


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """The policy.

    Attributes:
        model: A local directory, a Hugging Face id, or ``tiny-llama`` or ``small-llama`` (made on the spot).
        warmup: Warm the policy up first; null trains it as it is.
        gradient_checkpointing: Recompute activations in the backward pass.
        mixed_precision: ``bf16`` or ``no``; parameters are float32 either way.
    """

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    warmup: WarmupConfig | None = None
    gradient_checkpointing: bool = False
    mixed_precision: Literal["bf16", "no"] = "bf16"


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    """How rollouts are made.

    Attributes:
        prompts_per_step: Prompts of one RL step over all ranks; a multiple of the number of ranks.
        group_size: Samples of each prompt.
        max_tokens: Longest completion.
        max_context: Longest prompt and completion together.
        max_slots: Sequences a rank decodes together.
        temperature, top_k, top_p: Sampling; training uses the temperature, so RL wants top_k 0 and top_p 1.
        stop_strings: Completions also end with these.
        dtype: The engine's arithmetic.
        kv_memory_gb: Limit of a rank's KV cache; null for the free memory.
        resample: Rounds of further prompts, one for each group of a rank whose rewards are all alike and say nothing; such groups
            then stay out of the loss (DAPO's dynamic sampling).
    """

    prompts_per_step: int = 8
    group_size: int = 8
    max_tokens: int = 256
    max_context: int = 512
    max_slots: int = 32
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_strings: tuple[str, ...] = ()
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    kv_memory_gb: float | None = None
    resample: int = 0


@dataclass(frozen=True, slots=True)
class SpeculationConfig:
    """How rollouts are speculated; every choice is lossless.

    Attributes:
        strategy: ``adaptive``, ``plain``, or one strategy for all steps: ``<drafter>:<depth>`` drafts chains,
            ``<drafter>:<depth>x<width>/<nodes>`` trees of that many nodes, for example ``eagle3:5x4/12``.
        drafters: Which are built; names of `rollout.drafters.DRAFTERS`.
        arms: Strategies that ``adaptive`` chooses from; empty takes chains and trees of every drafter.
        selection: How it chooses: ``beg`` (ε-greedy) or ``thompson``.
        epsilon: Share of the time that explorations of ``beg`` may lose.
        max_nodes: Most draft tokens of a sequence in a verification.
        tree: Shape of trees: ``dynamic`` (EAGLE-2), ``opt_tree``, ``dyspec`` or ``static``.
        draw: Draft the ``likeliest`` tokens, or draw them, siblings with ``replacement`` or ``without_replacement``.
        verifier: Of drawn drafts: ``chain``, ``block``, ``recursive`` or ``spectr``; null takes chain for chains and recursive
            for trees.
        stop: When chains of model-based drafters end: ``fixed`` (at their depth), ``svip`` or ``specdec``.
        stop_threshold: Of that rule.
        tree_gain: Least expected tokens that another level of an ``opt_tree`` must bring.
        budgets: Draft tokens of the sequences in a batch: ``uniform``, or ``length_aware`` for more where more is left to decode.
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
class UpdateConfig:
    """The policy update. The defaults are GRPO with DAPO's token-level loss; configs/ has a recipe of each algorithm.

    Attributes:
        advantage: ``group`` (GRPO: reward less the group's mean), ``rloo`` (less the mean of the group's others),
            ``reinforce_pp`` (no groups: normalised over the whole batch) or ``gae`` (PPO: of each token, by a critic).
        lr, weight_decay, grad_clip: Of AdamW.
        schedule: Of the learning rate over the run's steps: ``constant``, ``linear``, ``cosine`` or ``rex``.
        lr_warmup_steps: RL steps over which the learning rate rises linearly.
        minibatches: Optimizer steps for each batch of rollouts.
        tokens_per_microbatch: Tokens packed into one forward.
        ratio: What is clipped: the ratio of each ``token``, or of the ``sequence``, length-normalised (GSPO; clips of a few 1e-4).
        clip_low, clip_high: The clip of the ratio below and above 1 (DAPO's clip-higher: 0.2 and 0.28).
        aggregate: What weighs alike in the loss: every ``token`` (DAPO), every ``sequence`` (GRPO as published), or ``constant``:
            tokens over the longest possible completion (Dr. GRPO).
        scale_by_std: Divide ``group`` advantages by the group's standard deviation (Dr. GRPO does not).
        kl_coef: Weight of the KL to the starting policy; 0 keeps no reference model.
        kl: Its estimate, ``k1``, ``k2`` or ``k3``.
        kl_in: Where it counts: in the ``loss``, or in the ``reward`` of each token.
        kl_target: KL of a token that ``kl_coef`` is adapted to; null keeps it.
        entropy_coef: Weight of the entropy bonus.
        importance: Corrects for what the engine drew under slightly other numbers than the trainer computes, by truncated
            importance sampling of each ``token`` or ``sequence``; ``none`` only measures it.
        importance_cap: Largest weight.
        mask_truncated: Leave completions that were cut at ``max_tokens`` out of the loss (DAPO's overlong filtering).
    """

    lr: float = 1e-6
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    schedule: Literal["constant", "linear", "cosine", "rex"] = "constant"
    lr_warmup_steps: int = 1
    minibatches: int = 1
    tokens_per_microbatch: int = 2048
    advantage: Literal["group", "rloo", "reinforce_pp", "gae"] = "group"
    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2
    aggregate: Literal["token", "sequence", "constant"] = "token"
    scale_by_std: bool = True
    kl_coef: float = 0.0
    kl: Literal["k1", "k2", "k3"] = "k3"
    kl_in: Literal["loss", "reward"] = "loss"
    kl_target: float | None = None
    entropy_coef: float = 0.0
    importance: Literal["none", "token", "sequence"] = "none"
    importance_cap: float = 2.0
    mask_truncated: bool = False


@dataclass(frozen=True, slots=True)
class CriticConfig:
    """PPO's critic, for ``update.advantage: gae``: a decoder of the policy's size with a head of its own.

    Attributes:
        lr, grad_clip: AdamW with a constant learning rate.
        gamma, gae_lambda: Discounts of rewards and of the critic's say (generalised advantage estimation).
        value_clip: How far an update may move a value; null does not limit it.
        warmup_steps: RL steps in which the critic alone learns.
    """

    lr: float = 1e-5
    grad_clip: float = 1.0
    gamma: float = 1.0
    gae_lambda: float = 0.95
    value_clip: float | None = 0.2
    warmup_steps: int = 0


@dataclass(frozen=True, slots=True)
class DrafterConfig:
    """The EAGLE-3 drafter and its training.

    Attributes:
        start: Directory of a drafter to start from, as warmup_drafter.py and export_drafter.py write it; null makes one after the
            first step.
        draft_vocab_size: Tokens it can draft; chosen by frequency in the first step's rollouts.
        vocabulary_every: RL steps after which they are chosen anew from the step's rollouts; 0 keeps them.
        schedule: ``idle`` trains only while other ranks still decode, so that no step waits; ``always`` goes through the passes
            after each rank's rollouts, whoever waits: for one rank alone, or where acceptance matters more than time; ``never``
            keeps the drafter as it is.
        least_idle_ranks: Idle ranks from which on those train.
        lr: AdamW's learning rate; warmup_drafter.py begins with three times that.
        lr_schedule: Of it over the run's steps, as ``update.schedule``.
        ensemble: Learning rates of drafters that are trained side by side, as multiples of ``lr``; the one that has lately done
            best is proposed (OnlineSpec). They share the time for training; each takes the memory of a drafter and its optimizer.
        optimistic: Updates on 2 g_t − g_{t−1} (OnlineSpec).
        loss: ``fkl``, ``rkl``, ``jsd``, ``tvd``, ``tvd++``, ``log_acceptance`` or ``length``.
        unroll: Draft positions trained on (training-time test).
        decay: Weight of each further position relative to the one before.
        mask_top: Leave out draft positions whose likeliest token under the policy is not among the drafter's so many likeliest
            (GRIFFIN); null leaves none out.
        on_policy: Weight of what the policy says after the drafter's own refused tokens (DistillSpec); 0 leaves it out.
        feedback_only: Learn only where verification refused a draft (online speculative decoding).
        tokens_per_microbatch: Tokens of one drafter update.
        passes: Passes over each step's rollouts, at most.
        judge_every: Updates between two judgements on sequences kept back.
        held_out_every: Every so many-th group of a rank is kept back; 0 keeps none and serves every update.
        previous_steps: How many steps back long sequences are kept.
        previous_share: Share of a micro-batch from those.
        age_decay: Weight of a sequence for each step of its age.
        reward_weight: How much more the completions of high reward count (ReSpec): 0 all alike, 1 from 0 to 2 times.
        snapshots: Drafters of past steps to keep in the run's ``drafters``; 0 writes none between checkpoints.
        memory_tokens, disk_tokens: Tokens of traces that a rank holds in memory, and on disk beyond that.
    """

    start: str | None = None
    draft_vocab_size: int = 4096
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


@dataclass(frozen=True, slots=True)
class MeasureConfig:
    """What is measured beside the run: every ``plain_every`` steps the same requests are decoded again without speculation, for a
    paired ratio; 0 never does."""

    plain_every: int = 0


@dataclass(frozen=True, slots=True)
class TrackingConfig:
    """Metrics always go to ``metrics.jsonl``; these add to it."""

    wandb: Literal["offline", "online", "disabled"] = "disabled"
    wandb_project: str = "paceline"
    tensorboard: bool = False


@dataclass(frozen=True, slots=True)
class RunConfig:
    """A recipe.

    Attributes:
        out: Directory of the run.
        seed: Every random number follows from it.
        steps: RL steps.
        save_every: Steps between checkpoints (the last step is always saved).
    """

    out: str = "runs/run"
    seed: int = 0
    steps: int = 10
    save_every: int = 5
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a recipe.

    Args:
        path: A YAML file. Its key ``base`` may name another one, from its own directory, whose keys it takes over and overrides.
        overrides: ``key.sub=value`` each, values as YAML.

    Raises:
        UserError: one line that names the file and key.
    """
    data = _read(Path(path), ())
    for override in overrides:
        apply_override(data, override)
    config = parse(RunConfig, data, where=str(path))
    check(config)
    return config


def _read(path: Path, below: tuple[Path, ...]) -> dict[str, Any]:
    if path in below:
        raise UserError(f"{path}: its base leads back to itself")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such recipe; those that ship are in configs/") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: a recipe is a mapping of keys to values, this is a {type(data).__name__}")
    base = data.pop("base", None)
    return data if base is None else _over(_read(path.parent / str(base), (*below, path)), data)


def _over(base: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """``base`` with the keys of ``data`` in place of its own, section by section."""
    merged = dict(base)
    for key, value in data.items():
        below = merged.get(key)
        merged[key] = _over(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged


def check(config: RunConfig) -> None:
    """Contradictions between values that are each valid.

    Raises:
        UserError: for the first one found.
    """
    r, u, d, s = config.rollout, config.update, config.drafter, config.speculation
    rules = [
        (r.group_size >= 2, "rollout.group_size is 1: group-relative advantages need at least 2 samples of each prompt"),
        (r.max_tokens >= 1, f"rollout.max_tokens is {r.max_tokens}: write at least 1"),
        (r.max_tokens < r.max_context, "rollout.max_context must exceed rollout.max_tokens: the prompt needs room too"),
        (r.resample >= 0, f"rollout.resample is {r.resample}: write a number from 0"),
        (
            r.resample == 0 or u.advantage in ("group", "rloo"),
            f"rollout.resample asks again where a group's advantages are zero; update.advantage {u.advantage} has no groups",
        ),
        (0 < r.temperature < float("inf"), f"rollout.temperature is {r.temperature}: RL samples; write a number above 0"),
        (0 < r.top_p <= 1, f"rollout.top_p is {r.top_p}: write a number in (0, 1]"),
        (1 <= s.max_nodes <= MOST_NODES, f"speculation.max_nodes is {s.max_nodes}: write 1 to {MOST_NODES}"),
        (0 <= s.epsilon < 1, f"speculation.epsilon is {s.epsilon}: write a number in [0, 1)"),
        (
            s.eagle3_window is None or s.eagle3_window >= 1,
            f"speculation.eagle3_window is {s.eagle3_window}: write at least 1, or null",
        ),
        (
            "draft_model" not in s.drafters or s.draft_model is not None,
            "speculation.drafters has draft_model: name the model in speculation.draft_model",
        ),
        (
            "composite" not in s.drafters or {"suffix", "eagle3"} <= set(s.drafters),
            "speculation.drafters has composite, which joins suffix and eagle3: list those too",
        ),
        (
            s.verifier is None or s.draw != "likeliest",
            f"speculation.verifier is {s.verifier}, but likeliest drafts need none: write null, or another speculation.draw",
        ),
        (
            s.verifier != "spectr" or s.draw == "replacement",
            "speculation.verifier spectr wants siblings drawn independently: write speculation.draw: replacement",
        ),
        (
            s.verifier not in ("chain", "block") or _only_chains(s),
            f"speculation.verifier {s.verifier} reads chains: name only such in speculation.strategy or arms, and no stand drafter",
        ),
        (
            s.draw == "likeliest" or "composite" not in s.drafters,
            "speculation.drafters has composite, which joins drafts of likeliest tokens: leave it out, or write draw: likeliest",
        ),
        (config.steps >= 1 and config.save_every >= 1, "steps and save_every must be at least 1"),
        (u.minibatches >= 1, f"update.minibatches is {u.minibatches}: write at least 1"),
        (u.lr > 0 and d.lr > 0, "learning rates must be above 0"),
        (config.critic.lr > 0, "learning rates must be above 0"),
        (
            0 < config.critic.gamma <= 1 and 0 <= config.critic.gae_lambda <= 1,
            "critic.gamma must lie in (0, 1] and critic.gae_lambda in [0, 1]",
        ),
        (u.kl_coef >= 0, f"update.kl_coef is {u.kl_coef}: write a number from 0"),
        (
            u.kl_coef == 0 or u.kl_in != "loss" or u.kl != "k1",
            "update.kl k1 has no gradient on average in the loss: write kl: k2 or k3, or kl_in: reward",
        ),
        (u.kl_target is None or u.kl_coef > 0, "update.kl_target adapts update.kl_coef, which is 0: write where to start"),
        (u.kl_target is None or u.kl_target > 0, f"update.kl_target is {u.kl_target}: write a number above 0, or null"),
        (u.importance_cap >= 1, f"update.importance_cap is {u.importance_cap}: write at least 1"),
        (
            u.advantage == "group" or u.scale_by_std,
            f"update.scale_by_std is about group advantages, update.advantage is {u.advantage}: leave it out",
        ),
        (
            len(d.ensemble) > 0 and all(multiple > 0 for multiple in d.ensemble),
            f"drafter.ensemble is {list(d.ensemble)}: write multiples of drafter.lr above 0, [1.0] for one drafter",
        ),
        (d.unroll >= 1, f"drafter.unroll is {d.unroll}: write at least 1"),
        (d.mask_top is None or d.mask_top >= 1, f"drafter.mask_top is {d.mask_top}: write at least 1, or null"),
        (
            d.loss != "length" or not (d.feedback_only or d.on_policy),
            "drafter.loss length is of whole drafts: drafter.feedback_only and on_policy weigh single positions; leave them out",
        ),
        (d.on_policy >= 0, f"drafter.on_policy is {d.on_policy}: write a number from 0"),
        (d.least_idle_ranks >= 1, f"drafter.least_idle_ranks is {d.least_idle_ranks}: write at least 1"),
        (
            d.tokens_per_microbatch >= 16 and d.passes >= 1 and d.judge_every >= 1,
            "drafter.tokens_per_microbatch must be at least 16, passes and judge_every at least 1",
        ),
        (d.held_out_every != 1, "drafter.held_out_every is 1: nothing would be left to train on; write 0, or at least 2"),
        (0 <= d.previous_share < 1, f"drafter.previous_share is {d.previous_share}: write a number in [0, 1)"),
        (0 < d.age_decay <= 1, f"drafter.age_decay is {d.age_decay}: write a number in (0, 1]"),
        (0 <= d.reward_weight <= 1, f"drafter.reward_weight is {d.reward_weight}: write a number in [0, 1]"),
        (
            config.task.score_workers >= 1 and config.task.score_seconds > 0 and config.task.score_deadline > 0,
            "task.score_workers must be at least 1, score_seconds and score_deadline above 0",
        ),
        (config.task.source != "jsonl" or config.task.path is not None, "task.source is jsonl: name the file in task.path"),
        (config.task.source != "reasoning_gym" or bool(config.task.datasets), "task.datasets is empty: name at least one"),
        (
            config.task.size >= r.prompts_per_step,
            "task.size is less than rollout.prompts_per_step: a step would repeat a prompt",
        ),
    ]
    for holds, message in rules:
        if not holds:
            raise UserError(message)
    for name in s.drafters:
        if name not in DRAFTERS:
            close = difflib.get_close_matches(name, DRAFTERS, n=1, cutoff=0.0)[0]
            raise UserError(f"speculation.drafters has {name!r}; did you mean {close}?")
    try:
        draft_rules(s)
        for text in s.arms if s.strategy in ("adaptive", "plain") else (*s.arms, s.strategy):
            Strategy.parse(text)
    except ValueError as error:
        raise UserError(f"speculation: {error}") from None


def _only_chains(s: SpeculationConfig) -> bool:
    named = s.arms if s.strategy == "adaptive" else (s.strategy,)
    return bool(named) and not any("x" in text for text in named) and "stand" not in s.drafters


def draft_rules(s: SpeculationConfig) -> DraftRules:
    """How model-based drafters make their drafts.

    Raises:
        ValueError: for choices that do not fit each other.
    """
    return DraftRules(s.tree, s.draw, s.stop, s.stop_threshold, s.tree_gain)


def to_dict(config: RunConfig) -> dict[str, Any]:
    """Plain data, as it would be written in YAML."""
    return dataclasses.asdict(config)
