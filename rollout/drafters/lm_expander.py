"""Expands draft trees with a full language model over a slot cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from paceline.rollout.drafters.draft_rows import DraftRows
from paceline.rollout.drafters.draft_seats import DraftSeats
from paceline.rollout.native import upload
from paceline.rollout.sequence import SequenceState

# (tokens [B, E], seats [4, B, E]) → logits [B, E, V]
Forward = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class LMExpander:
    """An `Expander` over a model whose cache holds the first ``trunks`` tokens of each sequence.

    Args:
        forward: Runs nodes through the model.
        root: Logits [B, V] after the last committed token; None computes them from that token, which is then
            the first node.
        sequences: Active sequences; sequence i sits in slot i.
        rows: Description of the sequences, on the device of the model.
        trunks: Number of tokens of each sequence that the cache holds, int64 [B, 1].
    """

    def __init__(
        self,
        forward: Forward,
        root: torch.Tensor | None,
        sequences: Sequence[SequenceState],
        rows: DraftRows,
        trunks: torch.Tensor,
    ) -> None:
        self._forward = forward
        self.vocabulary: torch.Tensor | None = None
        self._seats = DraftSeats(trunks)
        if root is None:
            last = upload([[s.tokens[-1]] for s in sequences], trunks.device)
            root = self.expand(last, torch.full_like(last, -1))[:, 0]
            self._seats.move_root()
        self._root = root
        self.temperatures = rows.temperatures

    def root(self) -> torch.Tensor:
        """Returns the logits after the last committed token, see `Expander.root`."""
        return self._root

    def expand(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Runs the nodes through the model, see `Expander.expand`."""
        return self._forward(tokens, self._seats.add(parents))
