"""The interfaces of whatever decodes a trainer's rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from paceline.rollout.api import Request, Rollout
from paceline.rollout.engine.engine import StepRecord


class Decoder(Protocol):
    """Turns requests into rollouts; `RolloutEngine` is a decoder.

    Attributes:
        records: Decode steps of the last call, as far as they are known.
    """

    records: list[StepRecord]

    def generate(
        self,
        requests: Sequence[Request],
        on_step: Callable[[StepRecord], None] | None = None,
        *,
        on_finish: Callable[[int, Rollout], None] | None = None,
    ) -> list[Rollout]:
        """Returns one rollout for each request, in order; that of a failed request has an ``error``.

        Args:
            requests: Completions to produce.
            on_step: Called after a decode step.
            on_finish: Called with a request's index and its rollout as soon as it is finished.
        """
        ...


class ServedBackend(Decoder, Protocol):
    """A decoder with its own copy of the weights, which it receives as files."""

    def generate_plain(
        self,
        requests: Sequence[Request],
        on_step: Callable[[StepRecord], None] | None = None,
        *,
        on_finish: Callable[[int, Rollout], None] | None = None,
    ) -> list[Rollout]:
        """Decodes requests without drafts, for a comparison, and otherwise as `generate` does."""
        ...

    def update_policy(self, shards: Sequence[Path], version: int) -> None:
        """Replaces the policy's weights; later tokens are decoded with the new ones.

        Args:
            shards: safetensors files, with the tensor names of the policy's checkpoint.
            version: Policy version, which rollouts note in their segments.
        """
        ...

    def update_drafter(self, directory: Path) -> None:
        """Replaces the drafter's weights by those of a directory in the export format."""
        ...

    def close(self) -> None:
        """Releases the resources of the backend."""
        ...
