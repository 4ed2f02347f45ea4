"""The scale section: how the policy is spread over ranks, and adapters."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class LoraConfig:
    """Low-rank adapters on the policy's linear layers (Hu et al., arXiv 2106.09685), through peft; all else
    stays as it is.
    """

    rank: int = 16
    """Of an adapter."""
    alpha: int = 32
    """It is scaled by alpha / rank."""
    targets: tuple[str, ...] = ()
    """Names of the layers; empty takes every linear layer of the decoder."""


@dataclass(frozen=True, slots=True)
class ScaleConfig:
    """How ranks share what is trained. By default each holds the whole policy, and gradients are averaged
    (DDP).
    """

    deepspeed: str | None = None
    """DeepSpeed's JSON file, for ZeRO; configs/deepspeed/ has one a stage. Keys that the recipe decides are
    refused."""
    fsdp2: bool = False
    """Shard by PyTorch's ``fully_shard``."""
    lora: LoraConfig | None = None
    """Train adapters alone; null trains every parameter."""
    balance: bool = True
    """Spread a step's tokens evenly over the ranks before the update, whoever decoded them."""
    timeout_minutes: float = 30.0
    """A rank that waits longer for another ends the job; ``--resume`` goes on from the last checkpoint."""

    @property
    def sharded(self) -> bool:
        """Whether a way of sharding was chosen, and not that each rank holds the whole policy."""
        return self.fsdp2 or self.deepspeed is not None
