"""Expands draft trees with the EAGLE-3 network."""

from __future__ import annotations

from collections.abc import Callable

import torch

from paceline.rollout.drafters.draft_rows import DraftRows

# (tokens [B, E], hidden states of their parents [B, E, hidden], seats [4, B, E]) → outputs and logits
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Eagle3Expander:
    """An `Expander` over the draft cache, which keeps the nodes of a tree side by side.

    Args:
        step: Runs nodes through the network, as `Network.step` does.
        newest: Output of the network at each sequence's last committed token [B, hidden], and its logits.
        rows: Description of the sequences.
        vocabulary: Target ids of the drafter's tokens.
    """

    def __init__(
        self, step: Step, newest: tuple[torch.Tensor, torch.Tensor], rows: DraftRows, vocabulary: torch.Tensor
    ) -> None:
        hidden, self._logits = newest
        self._step, self._trunks = step, rows.trunks
        self._hidden = hidden[:, None]  # outputs of the root and every expanded node
        self._ancestors = torch.zeros_like(self._trunks)
        self._depth = torch.zeros_like(self._trunks)
        self.vocabulary: torch.Tensor | None = vocabulary
        self.temperatures = rows.temperatures

    def root(self) -> torch.Tensor:
        """Returns the logits after the last committed token, see `Expander.root`."""
        return self._logits

    def expand(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Runs the nodes on top of their parents' outputs, see `Expander.expand`."""
        above = parents + 1
        index = torch.arange(
            self._hidden.shape[1] - 1, self._hidden.shape[1] - 1 + tokens.shape[1], device=tokens.device
        )
        depth = self._depth.gather(1, above) + 1
        ancestors = self._ancestors.gather(1, above) | (1 << index)
        trunks = self._trunks.expand_as(depth)
        seats = torch.stack([trunks - 1 + depth, trunks + index, trunks, ancestors])
        parent_hidden = self._hidden.gather(1, above[..., None].expand(-1, -1, self._hidden.shape[-1]))
        hidden, logits = self._step(tokens, parent_hidden, seats)
        self._hidden = torch.cat([self._hidden, hidden], dim=1)
        self._ancestors, self._depth = (
            torch.cat([self._ancestors, ancestors], 1),
            torch.cat([self._depth, depth], 1),
        )
        return logits
