"""The interface of EAGLE-3's one-layer network while it drafts, on torch's operators or native kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from paceline.rollout.sequence import SequenceState


@dataclass(frozen=True, slots=True)
class Reading:
    """Committed tokens that a drafter has not read yet; sequence i sits in slot i.

    Attributes:
        sequences: In slot order.
        seen: Positions of each that were read: token ``seen + 1`` is the next, with the target's features at
            position ``seen``.
        shift: Position of place 0 of each slot of the draft cache.
        taps: As in `DraftContext`.
    """

    sequences: Sequence[SequenceState]
    seen: Sequence[int]
    shift: Sequence[int]
    taps: torch.Tensor

    @property
    def counts(self) -> list[int]:
        """Tokens of each sequence to read."""
        return [len(s.tokens) - 1 - at for s, at in zip(self.sequences, self.seen, strict=True)]

    @property
    def places(self) -> list[int]:
        """Place of each sequence's first token to read."""
        return [at - shift for at, shift in zip(self.seen, self.shift, strict=True)]


class Network(Protocol):
    """One-layer draft network over a slot cache; sequence i sits in slot i."""

    def refresh(self) -> None:
        """The weights were changed in place."""
        ...

    def read(self, reading: Reading) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads tokens; the newest output of each sequence [B, hidden] and its logits [B, draft
        vocabulary].
        """
        ...

    def step(
        self, tokens: torch.Tensor, hidden: torch.Tensor, seats: torch.Tensor, shift: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """E more tokens of each sequence.

        Args:
            tokens: int64 [B, E].
            hidden: [B, E, hidden], the output of each one's parent.
            seats: int64 [4, B, E], as in `ForwardBatch`, counted from place 0 of each slot; E adjacent places
                a row.
            shift: Position of that place.

        Returns:
            The new outputs [B, E, hidden] and their logits [B, E, draft vocabulary].
        """
        ...
