"""Seats of the nodes of draft trees while they grow."""

from __future__ import annotations

import torch


class DraftSeats:
    """Assigns places in a cache to nodes, side by side after the tokens that each sequence holds there.

    Args:
        trunks: Number of tokens of each sequence that the cache holds, int64 [B, 1].
    """

    def __init__(self, trunks: torch.Tensor) -> None:
        self._trunks = trunks
        # of the root and every node so far
        self._ancestors, self._depth = torch.zeros_like(trunks), torch.zeros_like(trunks)
        self._used = 0

    def add(self, parents: torch.Tensor) -> torch.Tensor:
        """Returns the seats of E more nodes, int64 [4, B, E], as in `ForwardBatch`.

        Args:
            parents: Parents as in `Expander.expand`, int64 [B, E].
        """
        above, count = parents + 1, parents.shape[1]
        index = torch.arange(self._used, self._used + count, device=parents.device)
        depth = self._depth.gather(1, above) + 1
        ancestors = self._ancestors.gather(1, above) | (1 << index)
        trunks = self._trunks.expand_as(depth)
        self._ancestors = torch.cat([self._ancestors, ancestors], 1)
        self._depth = torch.cat([self._depth, depth], 1)
        self._used += count
        return torch.stack([trunks - 1 + depth, trunks + index, trunks, ancestors])

    def move_root(self) -> None:
        """Makes the first node the root: what were children of the root become children of that node."""
        self._ancestors, self._depth = self._ancestors[:, 1:], self._depth[:, 1:]
