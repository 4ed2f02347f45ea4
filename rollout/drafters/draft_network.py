"""The interface of EAGLE-3's one-layer network while it drafts, on torch's operators or native kernels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from paceline.rollout.drafters.base import TapReader
from paceline.rollout.graphs.graph_pool import Capturer
from paceline.rollout.sequence import SequenceState

MASK = -1  # token id of a mask in a `Reading`, where networks read their mask token and mask vector


@dataclass(frozen=True, slots=True)
class Reading:
    """Committed tokens for a drafter to read; sequence i sits in slot i.

    Attributes:
        sequences: Sequences in slot order.
        seen: Number of positions of each sequence that were read: token ``seen + 1`` is the next one,
            together with the target's features at position ``seen``.
        counts: Number of tokens of each sequence to read, at least 1.
        shift: Position in the text of place 0 of each slot of the draft cache.
        taps: Reads the target's hidden states, as in `DraftContext`.
        masks: Number of masks that follow each sequence's tokens, for drafts in one pass.
    """

    sequences: Sequence[SequenceState]
    seen: Sequence[int]
    counts: Sequence[int]
    shift: Sequence[int]
    taps: TapReader
    masks: int = 0

    @property
    def tokens(self) -> list[list[int]]:
        """The tokens to read of each sequence, and `MASK` for each mask."""
        return [
            s.tokens[at + 1 : at + 1 + count] + [MASK] * self.masks
            for s, at, count in zip(self.sequences, self.seen, self.counts, strict=True)
        ]

    @property
    def lengths(self) -> list[int]:
        """The number of tokens to read of each sequence and of masks after them."""
        return [count + self.masks for count in self.counts]

    @property
    def places(self) -> list[int]:
        """The place in the draft cache of each sequence's first token to read."""
        return [at - shift for at, shift in zip(self.seen, self.shift, strict=True)]


class Network(Protocol):
    """A one-layer draft network over a slot cache; sequence i sits in slot i."""

    def refresh(self) -> None:
        """Adopts weights that were changed in place."""
        ...

    def capture_graphs(self, capturer: Capturer, precapture: bool) -> None:
        """Makes steps run through captured graphs.

        Args:
            capturer: Capturer to use.
            precapture: Whether to capture them now; otherwise each is captured when first needed.
        """
        ...

    def read(self, reading: Reading) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads committed tokens, and masks if the weights have one.

        Returns:
            The outputs at each sequence's newest token and at the masks after it [B, 1 + masks, hidden], and
            their logits [B, 1 + masks, draft vocabulary].
        """
        ...

    def step(
        self, tokens: torch.Tensor, hidden: torch.Tensor, seats: torch.Tensor, shift: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs E more tokens of each sequence.

        Args:
            tokens: int64 [B, E], target ids.
            hidden: [B, E, hidden], the output at each token's parent.
            seats: int64 [4, B, E], as in `ForwardBatch`, counted from place 0 of each slot; each row writes E
                adjacent places.
            shift: Position in the text of place 0 of each slot.

        Returns:
            The new outputs [B, E, hidden] and their logits [B, E, draft vocabulary].
        """
        ...
