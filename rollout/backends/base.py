"""What a trainer needs of whatever decodes its rollouts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

from paceline.rollout.api import Request, Rollout
from paceline.rollout.engine.engine import StepRecord


class Decoder(Protocol):
    """Requests to rollouts; `RolloutEngine` is one.

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
        """All rollouts, in the order of ``requests``; a failed request is a rollout that says so.

        Args:
            requests: What to produce.
            on_step: Called while decoding goes on.
            on_finish: Called with a request's index and its rollout as soon as it is over.
        """
        ...


class ServedBackend(Decoder, Protocol):
    """A decoder with weights of its own, which are sent to it in files that it can read."""

    def update_policy(self, shards: Sequence[Path], version: int) -> None:
        """Decodes with these weights from now on.

        Args:
            shards: safetensors files under the names of the policy's checkpoint.
            version: Noted in the segments of rollouts.
        """
        ...

    def update_drafter(self, directory: Path) -> None:
        """Drafts with these weights from now on: a directory in the export format."""
        ...

    def close(self) -> None:
        """Gives back what it holds."""
        ...
