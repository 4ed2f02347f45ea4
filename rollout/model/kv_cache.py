"""The KV cache of all slots, one buffer per layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from paceline.rollout.machine_limits import available_memory
from paceline.rollout.model.attention import ForwardBatch
from paceline.rollout.native import PagedLines, load_cpu_kernels, upload
from paceline.rollout.transformers_api import Cache

SPAN_STEP = 128  # smallest bucket of the span, in tokens


@dataclass(frozen=True, slots=True)
class CacheShape:
    """Describes the size of a cache of ``slots`` sequences of up to ``capacity`` tokens.

    Attributes:
        layers: Number of layers that store keys and values.
        kv_heads: Number of key/value heads.
        head_dim: Size of a head.
        slots: Maximum number of sequences decoded together.
        capacity: Number of tokens that a slot holds.
        taps: Width of the extra features kept for each token (tapped hidden states); 0 for none.
        dtype: Dtype of keys, values and taps.
    """

    layers: int
    kv_heads: int
    head_dim: int
    slots: int
    capacity: int
    taps: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """The bytes of one token's keys, values and taps."""
        return (2 * self.layers * self.kv_heads * self.head_dim + self.taps) * self.dtype.itemsize


def available_bytes(device: torch.device) -> int:
    """Returns the memory of ``device`` that a cache may take.

    That is what this process may still allocate on a CPU, and four fifths of the free memory on a GPU. The
    engine's own cache on a GPU is planned instead (`paceline.rollout.model.memory_plan`).

    Raises:
        RuntimeError: The free memory of the CPU cannot be read.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] * 4 // 5
    try:
        return available_memory()
    except (OSError, RuntimeError) as error:
        raise RuntimeError(f"free memory cannot be read ({error}): set rollout.kv_memory_gb") from None


def cache_tokens(shape: CacheShape, device: torch.device, limit_bytes: int | None) -> int:
    """Returns how many tokens a cache holds: all slots at full capacity, or as many as memory allows.

    Args:
        shape: Size of the cache.
        device: Device of the cache.
        limit_bytes: Memory limit; None for the free memory.

    Raises:
        MemoryError: Not even one sequence of full length fits; the message has the numbers.
    """
    limit = available_bytes(device) if limit_bytes is None else limit_bytes
    minimum = shape.capacity * shape.token_bytes
    if minimum > limit:
        raise MemoryError(
            f"the KV cache needs {minimum / 1e9:.3g} GB for one sequence of {shape.capacity} tokens, "
            f"{limit / 1e9:.3g} GB are allowed: lower rollout.max_context or raise rollout.kv_memory_gb"
        )
    return min(shape.slots * shape.capacity, limit // shape.token_bytes)


def path_moves(starts: Sequence[int], paths: Sequence[Sequence[int]]) -> np.ndarray:
    """Returns the moves within slots that make the accepted nodes of draft trees consecutive.

    Args:
        starts: Place of node 0 of the tree, for each of the first B slots.
        paths: Indices of the accepted nodes of each tree, root first.

    Returns:
        Slot, source and target place of each move, int64 [M, 3].
    """
    moves = [
        (slot, start + node, start + order)
        for slot, (start, path) in enumerate(zip(starts, paths, strict=True))
        for order, node in enumerate(path)
        if node != order
    ]
    return np.array(moves, dtype=np.int64).reshape(-1, 3)


class SlotCache(Cache):
    """Stores the keys and values of all slots, behind transformers' cache interface.

    Each layer's keys and values are one buffer viewed as [2, slots, kv_heads, span, head_dim]. ``span`` is
    the length of the longest sequence being decoded, rounded up to a bucket. The first B slots are therefore
    one contiguous operand of a batched matrix product, and short sequences do not pay for the room of long
    ones. When the span grows, the buffer is laid out anew. Rows past the written length are finite, and
    attention masks them.

    The buffers hold ``tokens`` tokens: all slots at full capacity if memory allows, otherwise fewer. In the
    latter case the number of slots depends on the span (`slots_at`): many short sequences fit, or few long
    ones, which suits a batch with a long tail.

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
        self.shape = shape
        self.device = device
        self.tokens = cache_tokens(shape, device, limit_bytes)
        self.span = SPAN_STEP
        numel = 2 * self.tokens * shape.kv_heads * shape.head_dim
        self._buffer = torch.zeros(shape.layers, numel, dtype=shape.dtype, device=device)
        self._taps_buffer = torch.zeros(self.tokens * shape.taps, dtype=shape.dtype, device=device)
        self._layout()
        self.batch: ForwardBatch | None = None
        self._write_index: torch.Tensor | None = None

    def slots_at(self, length: int) -> int:
        """Returns how many sequences fit if the longest holds ``length`` tokens; at least one."""
        return max(min(self.shape.slots, self.tokens // self._span_for(length)), 1)

    def fits(self, lengths: Sequence[int]) -> bool:
        """Returns whether sequences of these lengths in tokens fit together; a single one always does."""
        return len(lengths) <= self.slots_at(max(lengths, default=0))

    @property
    def slots(self) -> int:
        """The number of sequences that the current layout holds."""
        return len(self.taps)

    def _span_for(self, length: int) -> int:
        """Returns the bucket of a length.

        Buckets are multiples of 128 up to 512; above, they grow by a third or a half, so that there are few.
        """
        if length <= 4 * SPAN_STEP:
            return min(-(-length // SPAN_STEP) * SPAN_STEP, self.shape.capacity)
        power = 1 << (length - 1).bit_length()
        return min(power * 3 // 4 if length <= power * 3 // 4 else power, self.shape.capacity)

    def _layout(self) -> None:
        """Views the buffers as slots of the current span."""
        s = self.shape
        self.span = min(self.span, s.capacity)
        slots = self.slots_at(self.span)
        shape = (2, slots, s.kv_heads, self.span, s.head_dim)
        numel = 2 * slots * s.kv_heads * self.span * s.head_dim
        self._layers = self._buffer[:, :numel].unflatten(1, shape)
        self._views = list(self._layers)
        self._pages = torch.arange(slots, dtype=torch.int32, device=self.device)[:, None]
        self.taps = self._taps_buffer[: slots * self.span * s.taps].view(slots, self.span, s.taps)

    def reserve(self, lengths: Sequence[int], active: int) -> None:
        """Makes room for sequences of these lengths in tokens in the first slots.

        The span shrinks only if no slot is active or if more slots are needed, because every change copies.

        Args:
            lengths: Length of each sequence; together they must fit.
            active: Number of leading slots whose contents are kept.
        """
        new_span = self._span_for(max(lengths))
        enough_slots = self.slots >= len(lengths)
        if new_span == self.span or (new_span < self.span and active and enough_slots):
            return
        old_views, old_taps, common = self._views, self.taps, min(self.span, new_span)
        self.span = new_span
        self._layout()
        for old, new in zip(old_views, self._views, strict=True):
            kept = old[:, :active, :, :common].clone()
            new.zero_()
            new[:, :active, :, :common] = kept
        self._move_taps(old_taps, active, common)

    def _move_taps(self, old: torch.Tensor, active: int, common: int) -> None:
        """Moves the taps of the active slots to the new layout, slot by slot.

        Taps are as large as several layers, so that a copy of all would take much memory. Both layouts view
        one buffer, so the slot that moves furthest goes first. What stays behind is finite.
        """
        order = range(active)
        for slot in order if self.span < old.shape[1] else reversed(order):
            self.taps[slot, :common] = old[slot, :common].clone()

    def begin(self, batch: ForwardBatch) -> None:
        """Declares where the next forward's tokens go; called once per forward, before the model."""
        self.batch = batch
        self._write_index = None

    def _lines_written(self, batch: ForwardBatch) -> torch.Tensor:
        """Returns each key's row in a layer's keys seen as [slots · KV · span, d], int64 [B · KV · Q]."""
        rows = torch.arange(batch.rows.start, batch.rows.stop, device=self.device)
        heads = torch.arange(self.shape.kv_heads, device=self.device)
        lines = (rows[:, None] * self.shape.kv_heads + heads)[:, :, None] * self.span
        return (lines + batch.places[:, None, :]).reshape(-1)

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: object,
        **kwargs: object,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores a layer's new keys and values.

        Args:
            key_states: Keys [B, KV, Q, d].
            value_states: Values [B, KV, Q, d].
            layer_idx: Index of the layer.
            *args: Ignored; part of transformers' interface.
            **kwargs: Ignored; part of transformers' interface.

        Returns:
            The keys and the values that attention reads, [B, KV, span, d] each.
        """
        assert self.batch is not None, "SlotCache.begin was not called"
        if self._write_index is None:
            self._write_index = self._lines_written(self.batch)
        keys, values = self._views[layer_idx]
        dim = self.shape.head_dim
        keys.view(-1, dim).index_copy_(0, self._write_index, key_states.reshape(-1, dim))
        values.view(-1, dim).index_copy_(0, self._write_index, value_states.reshape(-1, dim))
        return keys[self.batch.rows, :, : self.batch.span], values[self.batch.rows, :, : self.batch.span]

    def lines(self, layer_idx: int) -> torch.Tensor:
        """Returns a layer's keys and values, contiguous [2, slots, KV, span, d].

        Native kernels write and read them in place.
        """
        return self._views[layer_idx]

    def pages(self, layer: int) -> PagedLines:
        """Returns a layer's keys and values as pages of the whole span, one for each slot."""
        return PagedLines(self._views[layer].transpose(0, 1), self._pages)

    def write_taps(self, batch: ForwardBatch, taps: torch.Tensor) -> None:
        """Stores features [B, Q, taps] of the batch's tokens."""
        if batch.ragged is None:
            rows = torch.arange(batch.rows.start, batch.rows.stop, device=self.device)[:, None]
        else:
            rows = batch.ragged.token_slots[None]
        self.taps[rows, batch.places] = taps

    def keep_paths(self, starts: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """Makes the accepted nodes of draft trees consecutive, so that none of them is computed again.

        Args:
            starts: Place of node 0 of the tree, for each of the first B slots.
            paths: Indices of the accepted nodes of each tree, root first.
        """
        moves = path_moves(starts, paths)
        if not len(moves):
            return
        slots, sources, targets = moves.T
        kernels = load_cpu_kernels(self.device.type, self.shape.dtype)
        if kernels is not None:
            kernels.move_lines(self._views, slots, sources, targets)
        slot, source, target = upload(np.stack([slots, sources, targets]), self.device)
        if kernels is None:
            self._layers[:, :, slot, :, target] = self._layers[:, :, slot, :, source]
        if self.shape.taps:
            self.taps[slot, target] = self.taps[slot, source]

    def copy_slot(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copies the first ``length`` tokens of one slot to others."""
        for target in targets:
            self._layers[:, :, target, :, :length] = self._layers[:, :, source, :, :length]
            self.taps[target, :length] = self.taps[source, :length]

    def vacate(self, slot: int, last: int, length: int) -> None:
        """Moves the first ``length`` tokens of slot ``last``, if that is another slot, into a free one."""
        if last != slot:
            self.copy_slot(last, [slot], min(length, self.span))

    def taps_at(self, slots: torch.Tensor, places: torch.Tensor) -> torch.Tensor:
        """Returns the features [N, taps] of tokens; slots and places are int64 [N]."""
        return self.taps[slots, places.clamp(max=self.span - 1)]

    def read_slot(self, slot: int, length: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns copies of a slot's keys and values [layers, 2, KV, length, d] and taps [length, taps]."""
        return self._layers[:, :, slot, :, :length].contiguous(), self.taps[slot, :length].clone()

    def write_slot(self, slot: int, lines: torch.Tensor, taps: torch.Tensor) -> None:
        """Writes keys, values and taps from `read_slot` to the start of a slot, which has room for them."""
        self._layers[:, :, slot, :, : lines.shape[3]] = lines
        self.taps[slot, : len(taps)] = taps

    def clear_slot(self, slot: int) -> None:
        """Zeroes a slot.

        This is needed after a sequence with NaN, since a masked key has weight 0, and 0 times NaN is NaN.
        """
        self._layers[:, :, slot] = 0
        self.taps[slot] = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Returns 0.

        Sequences differ in length, so callers always pass positions and nothing reads this value.
        """
        return 0
