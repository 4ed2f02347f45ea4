"""A recipe's sections: every key, its type, its default and its meaning; drafting, task and lengths have
files of their own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from paceline.rl.config.length import LengthConfig
from paceline.rl.config.speculation import DrafterConfig, SpeculationConfig
from paceline.rl.config.task import TaskConfig


@dataclass(frozen=True, slots=True)
class WarmupConfig:
    """Supervised warm-up on worked solutions, before a run or by ``paceline warmup``; it is cached.

    Attributes:
        examples: Worked solutions, each seen once.
        batch_size: Solutions of one optimizer step.
        lr: Peak learning rate (linear decay to zero, short linear rise).
        seed: Of the examples; they are drawn apart from the RL problems.
        rechecks: Chance that a solution goes through its lines once more, and again: a policy that thinks
            longer than it need, with lengths of a long tail, to try length-aware rewards on.
    """

    examples: int = 1000
    batch_size: int = 16
    lr: float = 1e-4
    seed: int = 1234
    rechecks: float = 0.0


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
class TreeConfig:
    """Samples of a prompt that share their beginnings (TreePO).

    Attributes:
        segment_tokens: Tokens between two places where a sample may branch.
        roots: Samples that begin at the prompt.
        width: Branches of a place, at most.
    """

    segment_tokens: int = 32
    roots: int = 2
    width: int = 2


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """Rollouts by vLLM in place of the engine, which then only reads what was drawn, for the drafter
    (benchmarks/engines.md).

    Drafts come from the EAGLE-3 drafter of ``drafter.start``, which goes on learning; vLLM takes a drafter at
    its start only.

    Attributes:
        servers: URLs of servers, started by ``paceline serve RUN --exchange DIRECTORY``; empty runs vLLM in
            the process of a rank alone.
        exchange: That directory, which this machine and the servers see: new weights go through it, and it
            holds the token that servers ask for. Null takes the run's own, without servers.
        depth: Most draft tokens of a step.
        options: Further arguments of ``vllm.LLM``, without servers.
    """

    servers: tuple[str, ...] = ()
    exchange: str | None = None
    depth: int = 4
    options: dict[str, Any] = field(default_factory=dict)


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
        stop_strings: Completions also end with these; special tokens such as ``<|im_end|>`` count by their
            text.
        dtype: The engine's arithmetic.
        kv_memory_gb: Limit of a rank's KV cache; null for the free memory.
        resample: Rounds of further prompts, one for each group of a rank whose rewards are all alike and say
            nothing; such groups then stay out of the loss (DAPO's dynamic sampling).
        segment_tokens: Tokens of each sequence in a step, at most; what is unfinished is carried to the next
            step and trained on with its group, once all of that is over (UloRL's segment rollouts). Null
            decodes every completion to its end.
        tree: Let samples share their beginnings; null draws them apart.
        vllm: Let vLLM decode; null decodes with the engine.
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
    segment_tokens: int | None = None
    tree: TreeConfig | None = None
    vllm: VllmConfig | None = None


@dataclass(frozen=True, slots=True)
class UpdateConfig:
    """The policy update. The defaults are GRPO with DAPO's token-level loss; configs/ has a recipe of each
    algorithm.

    Attributes:
        advantage: ``group`` (GRPO: reward less the group's mean), ``rloo`` (less the mean of the group's
            others), ``tree`` (TreePO: reward less the mean of each set of samples that share a beginning,
            averaged), ``brpo`` (of stretches of thought, by the answers that cutting there gives:
            ``length.anytime``), ``reinforce_pp`` (no groups: normalised over the whole batch) or ``gae``
            (PPO: of each token, by a critic).
        lr, weight_decay, grad_clip: Of AdamW.
        schedule: Of the learning rate over the run's steps: ``constant``, ``linear``, ``cosine`` or ``rex``.
        lr_warmup_steps: RL steps over which the learning rate rises linearly.
        minibatches: Optimizer steps for each batch of rollouts.
        tokens_per_microbatch: Tokens packed into one forward.
        ratio: What is clipped: the ratio of each ``token``, or of the ``sequence``, length-normalised (GSPO;
            clips of a few 1e-4).
        clip_low, clip_high: The clip of the ratio below and above 1 (DAPO's clip-higher: 0.2 and 0.28).
        aggregate: What weighs alike in the loss: every ``token`` (DAPO), every ``sequence`` (GRPO as
            published), or ``constant``: tokens over the longest possible completion (Dr. GRPO).
        scale_by_std: Divide ``group`` advantages by the group's standard deviation (Dr. GRPO does not).
        kl_coef: Weight of the KL to the starting policy; 0 keeps no reference model.
        kl: Its estimate, ``k1``, ``k2`` or ``k3``.
        kl_in: Where it counts: in the ``loss``, or in the ``reward`` of each token.
        kl_target: KL of a token that ``kl_coef`` is adapted to; null keeps it.
        entropy_coef: Weight of the entropy bonus.
        importance: Corrects for what the engine drew under slightly other numbers than the trainer computes,
            by truncated importance sampling of each ``token`` or ``sequence``; ``none`` only measures it.
        importance_cap: Largest weight.
        mask_mastered: Leave tokens of positive advantage out of the loss that the policy says at least so
            probably, while its entropy is below ``mastered_below`` (UloRL's well-mastered positive tokens;
            0.99 there); null leaves none out.
        mastered_below: Nats.
        mask_truncated: Leave completions that were cut at ``max_tokens`` out of the loss (DAPO's overlong
            filtering).
    """

    lr: float = 1e-6
    weight_decay: float = 0.0
    grad_clip: float = 1.0
    schedule: Literal["constant", "linear", "cosine", "rex"] = "constant"
    lr_warmup_steps: int = 1
    minibatches: int = 1
    tokens_per_microbatch: int = 2048
    advantage: Literal["group", "rloo", "tree", "brpo", "reinforce_pp", "gae"] = "group"
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
    mask_mastered: float | None = None
    mastered_below: float = 0.2
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
class LoraConfig:
    """Low-rank adapters on the policy's linear layers (Hu et al., arXiv 2106.09685), through peft; all else
    stays as it is.

    Attributes:
        rank: Of an adapter.
        alpha: It is scaled by alpha / rank.
        targets: Names of the layers; empty takes every linear layer of the decoder.
    """

    rank: int = 16
    alpha: int = 32
    targets: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ScaleConfig:
    """How ranks share what is trained. By default each holds the whole policy, and gradients are averaged
    (DDP).

    Attributes:
        deepspeed: DeepSpeed's JSON file, for ZeRO; configs/deepspeed/ has one a stage. Keys that the recipe
            decides are refused.
        fsdp2: Shard by PyTorch's ``fully_shard``.
        lora: Train adapters alone; null trains every parameter.
        balance: Spread a step's tokens evenly over the ranks before the update, whoever decoded them.
        timeout_minutes: A rank that waits longer for another ends the job; ``--resume`` goes on from the last
            checkpoint.
    """

    deepspeed: str | None = None
    fsdp2: bool = False
    lora: LoraConfig | None = None
    balance: bool = True
    timeout_minutes: float = 30.0

    @property
    def sharded(self) -> bool:
        """Whether a way of sharding was chosen, and not that each rank holds the whole policy."""
        return self.fsdp2 or self.deepspeed is not None


@dataclass(frozen=True, slots=True)
class MeasureConfig:
    """What is measured beside the run: every ``plain_every`` steps the same requests are decoded again
    without speculation, for a paired ratio; 0 never does."""

    plain_every: int = 0


@dataclass(frozen=True, slots=True)
class EvaluationConfig:
    """Problems that the run is not trained on: from ``path``, else the share that ``task.heldout`` sets
    aside, else others that reasoning-gym makes. They are asked every ``eval_every`` steps, and by
    ``paceline evaluate``.

    Attributes:
        path: A file or data set of its own, read as ``task`` is; null takes the others.
        split: Of a Hugging Face data set in ``path``, such as ``test``; null takes ``task.split``.
        prompts: Problems of an evaluation within the run, at most.
        samples: Completions of each.
        temperature: Of these completions; null takes the rollouts', 0 is greedy.
    """

    path: str | None = None
    split: str | None = None
    prompts: int = 64
    samples: int = 1
    temperature: float | None = None


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
        keep_last: Checkpoints of the last saves to keep; those before the last one are in
            ``checkpoints/step-N``.
        keep_best: Keep the checkpoint of the best evaluation in ``checkpoints/best``.
        eval_every: Steps between evaluations, of which the last step always has one; 0 never evaluates.
    """

    out: str = "runs/run"
    seed: int = 0
    steps: int = 10
    save_every: int = 5
    keep_last: int = 1
    keep_best: bool = False
    eval_every: int = 0
    policy: PolicyConfig = field(default_factory=PolicyConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    rollout: RolloutConfig = field(default_factory=RolloutConfig)
    speculation: SpeculationConfig = field(default_factory=SpeculationConfig)
    update: UpdateConfig = field(default_factory=UpdateConfig)
    length: LengthConfig = field(default_factory=LengthConfig)
    critic: CriticConfig = field(default_factory=CriticConfig)
    drafter: DrafterConfig = field(default_factory=DrafterConfig)
    scale: ScaleConfig = field(default_factory=ScaleConfig)
    measure: MeasureConfig = field(default_factory=MeasureConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
