"""The KV cache on a GPU, in pages: sequences take the memory of the tokens that they hold."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from paceline.rollout.model.attention import ForwardBatch
from paceline.rollout.model.kv_cache import CacheShape, cache_tokens, path_moves
from paceline.rollout.native import PagedLines, upload
from paceline.rollout.transformers_api import Cache

PAGE = 32  # tokens of a page


class PagedCache(Cache):
    """Stores the keys and values of all slots in pages of 32 tokens (PagedAttention, arXiv 2309.06180).

    Pages are assigned when a slot's sequence grows and returned when it leaves, so that memory holds what the
    sequences hold, rounded up to pages, however much their lengths differ. Nothing moves when a sequence
    grows, so that captured graphs stay valid. Page 0 belongs to no sequence: padding is written there.

    Only kernels that follow the table of pages can read it (`paceline.rollout.native.triton_kernels`).

    Args:
        shape: Size of the cache.
        device: Device of the buffers.
        limit_bytes: Memory limit; None for the free memory.

    Raises:
        MemoryError: Not even one sequence of full length fits. It is raised before anything is allocated,
            with the numbers.
    """

    def __init__(self, shape: CacheShape, device: torch.device, limit_bytes: int | None = None) -> None:
        super().__init__(layers=[])
        self.shape, self.device = shape, device
        per_slot = _pages(shape.capacity)
        wanted = shape.slots * per_slot
        self._count = max(min(wanted, cache_tokens(shape, device, limit_bytes) // PAGE), per_slot)
        s = shape
        size = (s.layers, self._count + 1, 2, s.kv_heads, PAGE, s.head_dim)
        self._layers = torch.zeros(size, dtype=s.dtype, device=device)
        self._taps = torch.zeros(self._count + 1, PAGE, s.taps, dtype=s.dtype, device=device)
        self._free = list(range(self._count, 0, -1))
        # the row after the last slot is that of padding
        self._table = np.zeros((s.slots + 1, per_slot), dtype=np.int32)
        self._held = [0] * s.slots  # pages of each slot
        self._changed = False
        self._device_table = torch.zeros(self._table.shape, dtype=torch.int32, device=device)

    @property
    def span(self) -> int:
        """The tokens that a slot can hold; unlike a `SlotCache`'s it never changes."""
        return self._table.shape[1] * PAGE

    @property
    def slots(self) -> int:
        """The number of slots."""
        return self.shape.slots

    @property
    def tokens(self) -> int:
        """The number of tokens that all pages hold."""
        return self._count * PAGE

    @property
    def pages_held(self) -> int:
        """The number of pages that slots hold."""
        return self._count - len(self._free)

    def fits(self, lengths: Sequence[int]) -> bool:
        """Returns whether sequences of these lengths in tokens fit together; a single one always does."""
        return len(lengths) <= self.shape.slots and sum(map(_pages, lengths)) <= self._count

    def slots_at(self, length: int) -> int:
        """Returns how many sequences of ``length`` tokens fit; at least one."""
        return max(min(self.shape.slots, self._count // _pages(length)), 1)

    def reserve(self, lengths: Sequence[int], active: int) -> None:
        """Makes room for sequences of these lengths in tokens in the first slots.

        Args:
            lengths: Length of each sequence; together they must fit.
            active: Number of leading slots whose contents are kept.

        Raises:
            MemoryError: They do not fit.
        """
        for slot in range(active, self.shape.slots):
            self._return_pages(slot)
        for slot, length in enumerate(lengths):
            more = min(_pages(length), self._table.shape[1]) - self._held[slot]
            if more > len(self._free):
                raise MemoryError(f"the KV cache has {len(self._free)} free pages, {more} are needed")
            if more > 0:
                taken = [self._free.pop() for _ in range(more)]
                self._table[slot, self._held[slot] : self._held[slot] + more] = taken
                self._held[slot] += more
                self._changed = True
        self._publish()

    def _publish(self) -> None:
        """Copies a changed table to the device, in place because captured graphs hold its address."""
        if self._changed:
            self._device_table.copy_(upload(self._table.copy(), self.device))
            self._changed = False

    def _return_pages(self, slot: int) -> None:
        held = self._held[slot]
        if held:
            self._free += self._table[slot, :held].tolist()[::-1]
            self._table[slot, :held], self._held[slot] = 0, 0
            self._changed = True

    def vacate(self, slot: int, last: int, length: int) -> None:
        """Returns a slot's pages and moves the sequence in ``last``, if that is another slot, into it."""
        self._return_pages(slot)
        if last != slot:
            self._table[slot], self._held[slot] = self._table[last], self._held[last]
            self._table[last], self._held[last], self._changed = 0, 0, True
        self._publish()  # drafters read taps before the next room is reserved

    def begin(self, batch: ForwardBatch) -> None:
        """Does nothing: the kernels look up the places of tokens themselves."""

    def pages(self, layer: int) -> PagedLines:
        """Returns a layer's keys and values with the table of pages."""
        return PagedLines(self._layers[layer], self._device_table)

    def _lines_of(self, slots: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Returns the indices of tokens among all lines of all pages, int64 [N] on the device."""
        parts = (places // PAGE).clamp(max=self._table.shape[1] - 1)
        return self._device_table[slots, parts].long() * PAGE + places % PAGE

    def write_taps(self, batch: ForwardBatch, taps: torch.Tensor) -> None:
        """Stores features [1, N, taps] of the batch's tokens."""
        assert batch.ragged is not None
        lines = self._lines_of(batch.ragged.token_slots, batch.places[0])
        self._taps.flatten(0, 1).index_copy_(0, lines, taps[0])

    def taps_at(self, slots: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Returns the features [N, taps] of tokens; slots and places are int64 [N] on the device."""
        return self._taps.flatten(0, 1)[self._lines_of(slots, places)]

    def keep_paths(self, starts: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """Makes the accepted nodes of draft trees consecutive, see `SlotCache.keep_paths`."""
        moves = path_moves(starts, paths)
        if not len(moves):
            return
        slots, sources, targets = moves.T
        pages = [self._table[slots, places // PAGE] for places in (sources, targets)]
        rows = np.stack([pages[0], sources % PAGE, pages[1], targets % PAGE]).astype(np.int64)
        page, line, to_page, to_line = upload(rows, self.device)
        self._layers[:, to_page, :, :, to_line] = self._layers[:, page, :, :, line]
        self._taps[to_page, to_line] = self._taps[page, line]

    def copy_slot(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copies the first ``length`` tokens of one slot to others, which have room for them."""
        count = _pages(length)
        origin = upload(self._table[source, :count].astype(np.int64), self.device)
        for target in targets:
            goal = upload(self._table[target, :count].astype(np.int64), self.device)
            self._layers[:, goal] = self._layers[:, origin]
            self._taps[goal] = self._taps[origin]

    def read_slot(self, slot: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns copies of a slot's keys and values [layers, 2, KV, length, d] and taps [length, taps]."""
        pages = upload(self._table[slot, : _pages(length)].astype(np.int64), self.device)
        lines = self._layers[:, pages].permute(0, 2, 3, 1, 4, 5).flatten(3, 4)
        return lines[:, :, :, :length].contiguous(), self._taps[pages].flatten(0, 1)[:length]

    def write_slot(self, slot: int, lines: torch.Tensor, taps: torch.Tensor) -> None:
        """Writes keys, values and taps from `read_slot` to the start of a slot, which has room for them."""
        places = np.arange(lines.shape[3])
        rows = np.stack([self._table[slot, places // PAGE], places % PAGE]).astype(np.int64)
        page, line = upload(rows, self.device)
        self._layers[:, page, :, :, line] = lines.permute(3, 0, 1, 2, 4)
        self._taps[page, line] = taps

    def clear_slot(self, slot: int) -> None:
        """Does nothing: no kernel reads a line that no token of the sequence has been written to."""

    def padding(self, span: int) -> Sequence[int]:
        """Returns the column of padding in a `DeviceTokens` table: it writes to page 0 and sees nothing."""
        return self.shape.slots, 0, 0, 0, 0, 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns 0, see `SlotCache.get_seq_length`."""
        return 0


def _pages(length: int) -> int:
    """Returns the number of pages that hold ``length`` tokens."""
    return -(-length // PAGE)
