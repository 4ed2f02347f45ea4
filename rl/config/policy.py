"""The ``policy`` section: the model that is trained, its precision, and its supervised warm-up."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class WarmupConfig:
    """Supervised warm-up on worked solutions of ``task.datasets``.

    It takes place before a run or by ``paceline warmup``, and its result is cached.
    """

    examples: int = 1000
    """Number of worked solutions, each used once."""

    batch_size: int = 16
    """Number of solutions in one optimizer step."""

    lr: float = 1e-4
    """AdamW's peak learning rate: it rises linearly over the first tenth of the steps, then decays linearly
    to zero."""

    seed: int = 1234
    """Seed of the examples; another than the run's, so that they are not the RL problems."""

    rechecks: float = 0.0
    """Probability that a solution goes through its lines once more, again after each time, in [0, 1). This
    makes a policy that thinks longer than it needs to, with a long tail of lengths, to try length-aware
    rewards on."""


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """The model that is trained."""

    model: str = "HuggingFaceTB/SmolLM2-135M-Instruct"
    """Local directory or Hugging Face id, or ``tiny-llama`` or ``small-llama``, which are created with random
    weights."""

    warmup: WarmupConfig | None = None
    """Supervised warm-up before the run; null trains the model as it is."""

    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass, which saves memory and costs one more forward pass."""

    mixed_precision: Literal["bf16", "no"] = "bf16"
    """Precision of training's matrix products: ``bf16`` autocasts them, ``no`` computes in float32.
    Parameters are float32 with both. The drafter trains in float32 on CPUs without
    instructions for bfloat16."""
