"""Expands draft trees with a full language model over a slot cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from paceline.rollout.drafters.draft_rows import DraftRows
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
        self._trunks = trunks
        self._ancestors = torch.zeros_like(self._trunks)
        self._depth = torch.zeros_like(self._trunks)
        self._used = 0
        if root is None:
            last = upload([[s.tokens[-1]] for s in sequences], trunks.device)
            root = self.expand(last, torch.full_like(last, -1))[:, 0]
            # children of the root become children of that node
            self._ancestors, self._depth = self._ancestors[:, 1:], self._depth[:, 1:]
        self._root = root
        self.temperatures = rows.temperatures

    def root(self) -> torch.Tensor:
        """Returns the logits after the last committed token, see `Expander.root`."""
        return self._root

    def expand(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Runs the nodes through the model, see `Expander.expand`."""
        above = parents + 1
        index = torch.arange(self._used, self._used + tokens.shape[1], device=tokens.device)
        depth = self._depth.gather(1, above) + 1
        ancestors = self._ancestors.gather(1, above) | (1 << index)
        trunks = self._trunks.expand_as(depth)
        logits = self._forward(tokens, torch.stack([trunks - 1 + depth, trunks + index, trunks, ancestors]))
        self._used += tokens.shape[1]
        self._ancestors, self._depth = (
            torch.cat([self._ancestors, ancestors], 1),
            torch.cat([self._depth, depth], 1),
        )
        return logits
