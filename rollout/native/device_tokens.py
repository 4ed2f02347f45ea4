"""The description of a forward's tokens on a GPU, where captured graphs read it in place."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.rollout.native.kernels import RaggedTokens
from paceline.rollout.native.transfer import upload


@dataclass(frozen=True, slots=True)
class PagedLines:
    """Holds the keys and values of one layer in pages.

    Attributes:
        lines: [pages, 2, KV, page, d] with any strides of the first three dimensions.
        table: Page of each part of each slot, int32 [slots, parts].
    """

    lines: torch.Tensor
    table: torch.Tensor


@dataclass(frozen=True, slots=True)
class DeviceTokens:
    """Describes the tokens of a forward, without padding, in one tensor on the device.

    Attributes:
        table: int64 [6, N]: slot, position counted from place 0 of the slot, position in the text,
            place where the keys are written, number of leading places seen completely, and
            ancestors as bits; see `RaggedTokens`.
    """

    table: torch.Tensor

    @classmethod
    def of(cls, tokens: RaggedTokens, device: torch.device) -> DeviceTokens:
        """Uploads the description of a forward's tokens."""
        t = tokens
        rows = (t.token_slots, t.local_positions, t.positions, t.places, t.trunks, t.ancestors)
        return cls(upload(torch.stack(rows), device))

    @classmethod
    def from_seats(
        cls, seats: torch.Tensor, shift: torch.Tensor | None = None, slots: torch.Tensor | None = None
    ) -> DeviceTokens:
        """Describes E tokens of each of B slots on the device of their seats, int64 [4, B, E].

        Args:
            seats: Seats counted from place 0, as in `RaggedTokens.from_seats`.
            shift: Position of place 0 of each sequence, int64 [B]; None for 0.
            slots: The slots, int64 [B]; None for the first B.
        """
        local = seats[0]
        if slots is None:
            slots = torch.arange(len(local), device=seats.device)
        positions = local if shift is None else local + shift[:, None]
        return cls(torch.stack([slots[:, None].expand_as(local), local, positions, *seats[1:]]).flatten(1))

    @property
    def token_slots(self) -> torch.Tensor:
        """The slot of each token, int64 [N]."""
        return self.table[0]

    @property
    def seats(self) -> torch.Tensor:
        """The position, place, trunk and ancestors of each token, int64 [4, 1, N]."""
        return self.table[2:, None]

    @property
    def positions(self) -> torch.Tensor:
        """The position of each token in its text, int64 [N]."""
        return self.table[2]
