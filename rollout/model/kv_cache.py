"""Keys and values of every slot, in one block a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from paceline.rollout.machine_limits import available_memory
from paceline.rollout.model.attention import ForwardBatch
from paceline.rollout.native import load_kernels
from paceline.rollout.transformers_api import Cache

SPAN_STEP = 128


@dataclass(frozen=True, slots=True)
class CacheShape:
    """What a cache of ``slots`` sequences of up to ``capacity`` tokens holds.

    Attributes:
        layers, kv_heads, head_dim: Of the model.
        slots: Sequences decoded together.
        capacity: Tokens a slot holds.
        taps: Width of the extra features kept for each token (tapped hidden states); 0 for none.
        dtype: Of everything.
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
        """Bytes of one token's keys, values and taps."""
        return (2 * self.layers * self.kv_heads * self.head_dim + self.taps) * self.dtype.itemsize


def available_bytes(device: torch.device) -> int:
    """Free memory of ``device``; for the CPU, what this process may still allocate."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return available_memory()
    except (OSError, RuntimeError) as error:
        raise RuntimeError(f"{error}: give the KV cache a limit with kv_memory_gb") from None


class SlotCache(Cache):
    """KV cache of slots, through transformers' cache interface.

    Each layer's keys and values are one buffer seen as [2, slots, kv_heads, span, head_dim]. ``span`` is the
    longest sequence now decoded, rounded up to a bucket, so that the first B slots are one contiguous operand
    for a batched matrix product and short sequences do not pay for long ones' room; the buffer is laid out
    anew when the span grows. Rows past the written length are finite, and attention masks them.

    The buffers hold ``tokens`` tokens: all slots at full capacity where memory allows, else fewer, and then
        the number of slots
    depends on the span (`slots_at`). Many short sequences fit, or few long ones, as a batch with a long tail
    has them.

    Args:
        shape: What is held.
        device: Where.
        limit_bytes: Memory allowed; None for what is free.

    Raises:
        MemoryError: with the numbers, before anything is allocated, when not even one sequence of full length
            fits.
    """

    def __init__(self, shape: CacheShape, device: torch.device, limit_bytes: int | None = None) -> None:
        super().__init__(layers=[])
        limit = available_bytes(device) if limit_bytes is None else limit_bytes
        least = shape.capacity * shape.token_bytes
        if least > limit:
            raise MemoryError(
                f"the KV cache needs {least / 1e9:.3g} GB for one sequence of {shape.capacity} tokens, "
                f"{limit / 1e9:.3g} GB are allowed: lower rollout.max_context or raise rollout.kv_memory_gb"
            )
        self.shape = shape
        self.device = device
        self.tokens = min(shape.slots * shape.capacity, limit // shape.token_bytes)
        self.span = SPAN_STEP
        numel = 2 * self.tokens * shape.kv_heads * shape.head_dim
        self._buffers = [torch.zeros(numel, dtype=shape.dtype, device=device) for _ in range(shape.layers)]
        self._taps_buffer = torch.zeros(self.tokens * shape.taps, dtype=shape.dtype, device=device)
        self._layout()
        self.batch: ForwardBatch | None = None
        self._write_index: torch.Tensor | None = None

    def slots_at(self, length: int) -> int:
        """How many sequences fit when the longest holds ``length`` tokens; at least one."""
        return max(min(self.shape.slots, self.tokens // self._span_for(length)), 1)

    @property
    def slots(self) -> int:
        """How many sequences the present layout holds."""
        return len(self.taps)

    def _span_for(self, length: int) -> int:
        """The bucket of a length: multiples of 128 up to 512, then steps of a third or a half, so that there
        are few.
        """
        if length <= 4 * SPAN_STEP:
            return min(-(-length // SPAN_STEP) * SPAN_STEP, self.shape.capacity)
        power = 1 << (length - 1).bit_length()
        return min(power * 3 // 4 if length <= power * 3 // 4 else power, self.shape.capacity)

    def _layout(self) -> None:
        s = self.shape
        self.span = min(self.span, s.capacity)
        slots = self.slots_at(self.span)
        shape = (2, slots, s.kv_heads, self.span, s.head_dim)
        numel = 2 * slots * s.kv_heads * self.span * s.head_dim
        self._views = [buffer[:numel].view(shape) for buffer in self._buffers]
        self.taps = self._taps_buffer[: slots * self.span * s.taps].view(slots, self.span, s.taps)

    def reserve(self, length: int, active: int, slots: int) -> None:
        """Makes room for ``slots`` sequences, the longest of ``length`` tokens, keeping the first ``active``
        slots' contents.

        The span shrinks only where none is active or where the slots are wanted: every change copies.
        ``slots`` must be at most `slots_at` of that length.
        """
        wanted = self._span_for(length)
        enough = self.slots >= slots
        if wanted == self.span or (wanted < self.span and active and enough):
            return
        old_views, old_taps = self._views, self.taps
        self.span = wanted
        self._layout()
        for old, new in zip([*old_views, old_taps], [*self._views, self.taps], strict=True):
            where = (slice(None), slice(0, active)) if old.ndim == 5 else (slice(0, active),)
            common = min(old.shape[-2], wanted)
            kept = old[where][..., :common, :].clone()
            new.zero_()
            new[where][..., :common, :] = kept

    def begin(self, batch: ForwardBatch) -> None:
        """Declares where the next forward's tokens go. Called once a forward, before the model."""
        self.batch = batch
        self._write_index = None

    def _lines_written(self, batch: ForwardBatch) -> torch.Tensor:
        """int64 [B · KV · Q], where each key goes in a layer's keys seen as [slots · KV · span, d]."""
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
        """Stores [B, KV, Q, d] keys and values; returns those that attention reads, [B, KV, span, d]."""
        assert self.batch is not None, "SlotCache.begin was not called"
        if self._write_index is None:
            self._write_index = self._lines_written(self.batch)
        keys, values = self._views[layer_idx]
        dim = self.shape.head_dim
        keys.view(-1, dim).index_copy_(0, self._write_index, key_states.reshape(-1, dim))
        values.view(-1, dim).index_copy_(0, self._write_index, value_states.reshape(-1, dim))
        return keys[self.batch.rows, :, : self.batch.span], values[self.batch.rows, :, : self.batch.span]

    def lines(self, layer_idx: int) -> torch.Tensor:
        """A layer's keys and values, [2, slots, KV, span, d] and contiguous, for kernels that write and read
        in place.
        """
        return self._views[layer_idx]

    def write_taps(self, batch: ForwardBatch, taps: torch.Tensor) -> None:
        """Stores features [B, Q, taps] of the batch's tokens."""
        if batch.ragged is None:
            rows = torch.arange(batch.rows.start, batch.rows.stop, device=self.device)[:, None]
        else:
            rows = batch.ragged.token_slots[None]
        self.taps[rows, batch.places] = taps

    def keep_paths(self, starts: Sequence[int], paths: Sequence[Sequence[int]]) -> None:
        """Makes the accepted nodes of draft trees consecutive, so that nothing of them is computed again.

        Args:
            starts: Place of node 0 of the tree of each of the first B slots.
            paths: Indices of its accepted nodes, root first.
        """
        moves = [
            (slot, start + node, start + order)
            for slot, (start, path) in enumerate(zip(starts, paths, strict=True))
            for order, node in enumerate(path)
            if node != order
        ]
        if not moves:
            return
        slots, sources, targets = np.array(moves, dtype=np.int64).T
        kernels = load_kernels(self.device.type, self.shape.dtype)
        if kernels is not None:
            kernels.move_lines(self._views, slots, sources, targets)
        slot, source, target = (
            torch.from_numpy(np.ascontiguousarray(x)).to(self.device) for x in (slots, sources, targets)
        )
        if kernels is None:
            for view in self._views:
                view[:, slot, :, target] = view[:, slot, :, source]
        if self.shape.taps:
            self.taps[slot, target] = self.taps[slot, source]

    def copy_slot(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copies the first ``length`` tokens of one slot to others."""
        for target in targets:
            for view in self._views:
                view[:, target, :, :length] = view[:, source, :, :length]
            self.taps[target, :length] = self.taps[source, :length]

    def clear_slot(self, slot: int) -> None:
        """Zeroes a slot. Needed after a sequence with NaN: a masked key of weight 0 times NaN is NaN."""
        for view in self._views:
            view[:, slot] = 0
        self.taps[slot] = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Sequences differ in length, so positions are always given and this is never the answer to anything:
        0.
        """
        return 0
