"""The rollout section: what a step samples, and who decodes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, slots=True)
class TreeConfig:
    """Samples of a prompt that share their beginnings (TreePO)."""

    segment_tokens: int = 32
    """Tokens between two places where a sample may branch."""
    roots: int = 2
    """Samples that begin at the prompt."""
    width: int = 2
    """Branches of a place, at most."""


@dataclass(frozen=True, slots=True)
class VllmConfig:
    """Rollouts by vLLM in place of the engine, which then only reads what was drawn, for the drafter
    (docs/serving.md).

    Drafts come from the EAGLE-3 drafter of ``drafter.start``, which goes on learning; vLLM takes a drafter at
    its start only.
    """

    servers: tuple[str, ...] = ()
    """URLs of servers, started by ``paceline serve RUN --exchange DIRECTORY``; empty runs vLLM in the process
    of a rank alone."""
    exchange: str | None = None
    """That directory, which this machine and the servers see: new weights go through it, and it holds the
    token that servers ask for. Null takes the run's own, without servers."""
    depth: int = 4
    """Most draft tokens of a step."""
    options: dict[str, Any] = field(default_factory=dict)
    """Further arguments of ``vllm.LLM``, without servers."""


@dataclass(frozen=True, slots=True)
class RolloutConfig:
    """How rollouts are made."""

    prompts_per_step: int = 8
    """Prompts of one RL step over all ranks; a multiple of the number of ranks."""
    group_size: int = 8
    """Samples of each prompt."""
    max_tokens: int = 256
    """Longest completion."""
    max_context: int = 512
    """Longest prompt and completion together."""
    max_slots: int = 32
    """Sequences a rank decodes together. temperature, top_k, top_p: Sampling; training uses the temperature,
    so RL wants top_k 0 and top_p 1."""
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    stop_strings: tuple[str, ...] = ()
    """Completions also end with these; special tokens such as ``<|im_end|>`` count by their text."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """The engine's arithmetic."""
    kv_memory_gb: float | None = None
    """Limit of a rank's KV cache; null for the free memory."""
    resample: int = 0
    """Rounds of further prompts, one for each group of a rank whose rewards are all alike and say nothing;
    such groups then stay out of the loss (DAPO's dynamic sampling)."""
    segment_tokens: int | None = None
    """Tokens of each sequence in a step, at most; what is unfinished is carried to the next step and trained
    on with its group, once all of that is over (UloRL's segment rollouts). Null decodes every completion to
    its end."""
    tree: TreeConfig | None = None
    """Let samples share their beginnings; null draws them apart."""
    vllm: VllmConfig | None = None
    """Let vLLM decode; null decodes with the engine."""
