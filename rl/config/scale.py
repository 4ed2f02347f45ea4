"""The ``scale`` section: how training is distributed over ranks, and low-rank adapters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Low-rank adapters on the policy's linear layers (LoRA, arXiv 2106.09685), through peft.

    All other parameters are frozen.
    """

    rank: int = 16
    """Rank r of each adapter; at least 1."""

    alpha: int = 32
    """Scale of the adapters: the update B A is multiplied by alpha / rank; above 0."""

    targets: tuple[str, ...] = ()
    """Names of the layers that get an adapter, such as ``q_proj``; empty takes every linear layer of the
    decoder."""


@dataclass(frozen=True, slots=True)
class ScaleConfig:
    """How ranks share the training.

    By default each rank holds the whole policy, and gradients are averaged (DDP).
    """

    deepspeed: str | None = None
    """DeepSpeed JSON file, for ZeRO; configs/deepspeed/ has one for each stage. It must leave out what the
    recipe decides, such as the optimizer and batch sizes. Not with ``fsdp2``."""

    fsdp2: bool = False
    """Shard the policy with PyTorch's ``fully_shard`` (FSDP2). Not with ``deepspeed``."""

    lora: LoraConfig | None = None
    """Train only low-rank adapters; null trains every parameter."""

    balance: bool = True
    """Redistribute a step's samples before the update, so that ranks have about equal compute, whichever rank
    decoded them."""

    timeout_minutes: float = 30.0
    """Minutes that a rank waits for another before the job ends; above 0. ``--resume`` continues from the
    last checkpoint."""

    @property
    def sharded(self) -> bool:
        """Whether the policy is sharded, by DeepSpeed or FSDP2, instead of held whole by each rank."""
        return self.fsdp2 or self.deepspeed is not None
