"""The policy section: which policy, its precision, and a warm-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class WarmupConfig:
    """Supervised warm-up on worked solutions, before a run or by ``paceline warmup``; it is cached."""

    examples: int = 1000
    """Worked solutions, each seen once."""
    batch_size: int = 16
    """Solutions of one optimizer step."""
    lr: float = 1e-4
    """Peak learning rate (linear decay to zero, short linear rise)."""
    seed: int = 1234
    """Of the examples; they are drawn apart from the RL problems."""
    rechecks: float = 0.0
    """Chance that a solution goes through its lines once more, and again: a policy that thinks longer than it
    need, with lengths of a long tail, to try length-aware rewards on."""


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """The policy."""

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """A local directory, a Hugging Face id, or ``tiny-llama`` or ``small-llama`` (made on the spot)."""
    warmup: WarmupConfig | None = None
    """Warm the policy up first; null trains it as it is."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass."""
    mixed_precision: Literal["bf16", "no"] = "bf16"
    """``bf16`` or ``no``; parameters are float32 either way."""
