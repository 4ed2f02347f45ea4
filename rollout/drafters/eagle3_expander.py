"""Expands draft trees with the EAGLE-3 network, a pass for each level or one for all."""

from __future__ import annotations

from collections.abc import Callable

import torch

from paceline.rollout.drafters.draft_rows import DraftRows
from paceline.rollout.drafters.draft_seats import DraftSeats

# (tokens [B, E], hidden states of their parents [B, E, hidden], seats [4, B, E]) → outputs and logits
Step = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]


class Eagle3Expander:
    """An `Expander` over the draft cache, which keeps the nodes of a tree side by side.

    Args:
        step: Runs nodes through the network, as `Network.step` does.
        newest: Output of the network at each sequence's last committed token [B, 1, hidden], and its logits.
        rows: Description of the sequences.
        vocabulary: Target ids of the drafter's tokens.
    """

    def __init__(
        self, step: Step, newest: tuple[torch.Tensor, torch.Tensor], rows: DraftRows, vocabulary: torch.Tensor
    ) -> None:
        hidden, self._logits = newest
        self._step, self._seats = step, DraftSeats(rows.trunks)
        self._hidden = hidden  # outputs of the root and every expanded node
        self.vocabulary: torch.Tensor | None = vocabulary
        self.temperatures = rows.temperatures

    def root(self) -> torch.Tensor:
        """Returns the logits after the last committed token, see `Expander.root`."""
        return self._logits[:, 0]

    def expand(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Runs the nodes on top of their parents' outputs, see `Expander.expand`."""
        above = (parents + 1)[..., None].expand(-1, -1, self._hidden.shape[-1])
        hidden, logits = self._step(tokens, self._hidden.gather(1, above), self._seats.add(parents))
        self._hidden = torch.cat([self._hidden, hidden], dim=1)
        return logits


class ParallelExpander:
    """An `Expander` whose distributions were all computed before the tree grows.

    Args:
        logits: [B, L, W], after the last committed token and at the levels below it.
        rows: Description of the sequences.
        vocabulary: Target ids of the drafter's tokens.
    """

    def __init__(self, logits: torch.Tensor, rows: DraftRows, vocabulary: torch.Tensor) -> None:
        self._logits, self.temperatures = logits, rows.temperatures
        self.vocabulary: torch.Tensor | None = vocabulary
        self._depth = torch.zeros(len(logits), 1, dtype=torch.long, device=logits.device)

    def root(self) -> torch.Tensor:
        """Returns the logits after the last committed token, see `Expander.root`."""
        return self._logits[:, 0]

    def expand(self, tokens: torch.Tensor, parents: torch.Tensor) -> torch.Tensor:
        """Returns the logits of the nodes' level, whatever their tokens, see `Expander.expand`."""
        depth = self._depth.gather(1, parents + 1) + 1
        self._depth = torch.cat([self._depth, depth], 1)
        return self._logits.gather(1, depth[..., None].expand(-1, -1, self._logits.shape[-1]))
