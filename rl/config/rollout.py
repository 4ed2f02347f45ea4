"""The ``rollout`` section: what a step samples, and which engine decodes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class TreeConfig:
    """Samples of a prompt that share prefixes (TreePO, arXiv 2508.17445, section 2)."""

    segment_tokens: int = 32
    """Number of tokens between two places where a sample may branch; at least 1."""

    roots: int = 2
    """Number of samples that start at the prompt, from 1 to ``rollout.group_size``."""

    width: int = 2
    """Largest number of branches that leave one place; at least 2."""


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """Rollouts by vLLM instead of the engine (docs/serving.md).

    The engine then only reads the sampled tokens, to train the drafter. Drafts come from the EAGLE-3 drafter
    in ``drafter.start``, whose training continues; vLLM loads a drafter only at its start.
    """

    servers: tuple[str, ...] = ()
    """URLs of servers started by ``paceline serve RUN --exchange DIRECTORY``; empty runs vLLM inside the
    process of a single rank."""

    exchange: str | None = None
    """Directory through which new weights reach the servers, shared by this machine and theirs; it also holds
    the servers' access token. Required with ``servers``; null without them takes a directory of the run."""

    depth: int = 4
    """Largest number of draft tokens in one decode step; at least 1."""

    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``vllm.LLM``, without ``servers``."""


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    """How many completions a step samples, how, and by which engine."""

    prompts_per_step: int = 8
    """Number of prompts in one RL step over all ranks; a multiple of the number of ranks."""

    group_size: int = 8
    """Number of samples of each prompt; at least 2, because advantages compare them."""

    max_tokens: int = 256
    """Largest number of tokens of a completion; at least 1."""

    max_context: int = 512
    """Largest number of tokens of prompt and completion together; above ``max_tokens``."""

    max_slots: int = 32
    """Largest number of sequences that a rank decodes at a time."""

    temperature: float = 1.0
    """Sampling temperature; above 0. The trainer divides logits by it too, so that log-probs match."""

    top_k: int = 0
    """Number of likeliest tokens to sample from; 0 samples from all. The trainer's log-probs do not account
    for it, so RL should keep 0."""

    top_p: float = 1.0
    """Probability mass of the likeliest tokens to sample from (nucleus sampling), in (0, 1]; 1 samples from
    all. The trainer's log-probs do not account for it, so RL should keep 1."""

    stop_strings: tuple[str, ...] = ()
    """Strings that end a completion, beside the end-of-sequence tokens; special tokens such as ``<|im_end|>``
    count by their text."""

    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """Data type of the engine's weights and KV cache."""

    match_trainer: bool = False
    """Refuse to start unless the trainer computes exactly the log-probs that rollouts are sampled with, so
    that importance ratios are 1 until the first optimizer step. On a CPU in bfloat16 a Llama-like policy does
    so with either value, see docs/exactness.md."""

    kv_memory_gb: float | None = None
    """Limit of a rank's KV cache, in GB (10⁹ bytes); above 0. Null takes the free memory (of a GPU what the
    plan of its memory leaves, see docs/gpu.md), up to what ``max_slots`` sequences of ``max_context`` tokens
    need."""

    resample: int = 0
    """Largest number of rounds of further prompts, in each of which a rank asks one for every group with
    equal rewards, which has no gradient. Such groups are left out of the loss (dynamic sampling: DAPO, arXiv
    2503.14476); 0 does not resample. Only with ``update.advantage`` ``group`` or ``rloo``."""

    segment_tokens: int | None = None
    """Largest number of tokens that each sequence decodes in one step. Unfinished sequences continue in the
    next step, and a group is trained on once all of its samples are finished (segment rollouts: UloRL, arXiv
    2507.19766, section 3.1); at least 1. Null decodes every completion to its end."""

    tree: TreeConfig | None = None
    """Samples of a prompt share prefixes; null samples them independently."""

    vllm: VllmConfig | None = None
    """vLLM decodes the rollouts; null decodes them with Paceline's engine."""
