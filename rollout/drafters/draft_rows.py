"""What a draft needs to know of the sequences of a batch, in one tensor that is uploaded at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from paceline.rollout.counter_rng import Stream, step_uniforms_on_device
from paceline.rollout.native import upload
from paceline.rollout.sequence import SequenceState, seeds_of

_FIELDS = 6


@dataclass(frozen=True, slots=True)
class DraftRows:
    """Describes the sequences of a batch; sequence i sits in slot i.

    Attributes:
        table: int64 [6, B]: slot, number of tokens in the draft cache, position in the text of place 0 of the
            slot, bits of the seed, number of committed tokens, and bits of the float64 temperature, 0 for a
            greedy request.
    """

    table: torch.Tensor

    @classmethod
    def of(
        cls,
        sequences: Sequence[SequenceState],
        device: torch.device,
        shift: Sequence[int] | None = None,
        padding: tuple[int, int] | None = None,
    ) -> DraftRows:
        """Describes sequences of which all but the last token are in the draft cache.

        Args:
            sequences: Active sequences.
            device: Device of the table; a CUDA device is not waited for.
            shift: Position in the text of place 0 of each slot; None for 0.
            padding: Number of rows to fill up to, and the slot of the rows that are added.
        """
        count = len(sequences)
        rows, slot = (count, 0) if padding is None else padding
        table = np.zeros((_FIELDS, rows), dtype=np.int64)
        table[0, :count], table[0, count:] = np.arange(count), slot
        table[2, :count] = 0 if shift is None else shift
        table[3, :count] = seeds_of(sequences).view(np.int64)
        table[4, :count] = [len(s.tokens) for s in sequences]
        table[1, :count] = table[4, :count] - 1 - table[2, :count]
        params = [s.request.params for s in sequences]
        temperatures = np.array([0.0 if p.greedy else p.divisor for p in params])
        table[5, :count] = temperatures.view(np.int64)
        return cls(upload(table, device))

    @property
    def slots(self) -> torch.Tensor:
        """The slot of each sequence, int64 [B]."""
        return self.table[0]

    @property
    def trunks(self) -> torch.Tensor:
        """The number of tokens of each sequence that the draft cache holds, int64 [B, 1]."""
        return self.table[1][:, None]

    @property
    def shift(self) -> torch.Tensor:
        """The position in the text of place 0 of each slot, int64 [B]."""
        return self.table[2]

    @property
    def committed(self) -> torch.Tensor:
        """The number of committed tokens of each sequence, int64 [B, 1]."""
        return self.table[4][:, None]

    @property
    def greedy(self) -> torch.Tensor:
        """Which requests are greedy, bool [B]."""
        return self.table[5] == 0

    @property
    def temperatures(self) -> torch.Tensor:
        """The temperatures of the requests, float32 [B].

        A greedy request has temperature 1: its drafts are ranked by the drafter's unscaled probabilities.
        """
        given = self.table[5].view(torch.float64).float()
        return torch.where(given == 0, 1.0, given)

    def uniforms(self, first: int, count: int) -> torch.Tensor:
        """Returns random numbers of the step for drawing drafts, float64 [B, count], see `step_uniforms`."""
        return step_uniforms_on_device(self.table[3], self.table[4], first, count, Stream.DRAFT)
