"""Keys and values of every slot, in one block a layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import Cache

from rollout.attention import ForwardBatch

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
    def bytes(self) -> int:
        """Bytes of keys, values and taps when full."""
        per_token = 2 * self.layers * self.kv_heads * self.head_dim + self.taps
        return self.slots * self.capacity * per_token * self.dtype.itemsize


def available_bytes(device: torch.device) -> int:
    """Free memory of ``device``, or of the machine for the CPU."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with Path("/proc/meminfo").open(encoding="ascii") as lines:
        for line in lines:
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/meminfo has no MemAvailable: give the KV cache a limit with kv_memory_gb")


class SlotCache(Cache):
    """KV cache of fixed slots, through transformers' cache interface.

    Each layer's keys are one buffer seen as [slots, kv_heads, span, head_dim]. ``span`` is the longest sequence now decoded,
    rounded up to 128, so that the first B slots are one contiguous operand for a batched matrix product and short sequences
    do not pay for long ones' room; the buffer is laid out anew when the span grows. Rows past the written length are
    finite, and attention masks them.

    Raises:
        MemoryError: with the numbers, before anything is allocated, when the full size exceeds ``limit_bytes`` (or the free
            memory, when no limit is given).
    """

    def __init__(self, shape: CacheShape, device: torch.device, limit_bytes: int | None = None) -> None:
        super().__init__(layers=[])
        limit = available_bytes(device) if limit_bytes is None else limit_bytes
        if shape.bytes > limit:
            raise MemoryError(
                f"the KV cache needs {shape.bytes / 1e9:.2f} GB ({shape.slots} slots x {shape.capacity} tokens), "
                f"{limit / 1e9:.2f} GB are allowed: lower rollout.max_slots or rollout.max_context"
            )
        self.shape = shape
        self.device = device
        self.span = SPAN_STEP
        numel = shape.slots * shape.kv_heads * shape.capacity * shape.head_dim
        self._buffers = [torch.zeros(2 * numel, dtype=shape.dtype, device=device) for _ in range(shape.layers)]
        self._layout()
        self.taps = torch.zeros(shape.slots, shape.capacity, shape.taps, dtype=shape.dtype, device=device)
        self.batch: ForwardBatch | None = None
        self._write_index: torch.Tensor | None = None

    def _layout(self) -> None:
        s = self.shape
        self.span = min(self.span, s.capacity)
        shape = (2, s.slots, s.kv_heads, self.span, s.head_dim)
        numel = s.slots * s.kv_heads * self.span * s.head_dim
        self._views = [buffer[: 2 * numel].view(shape) for buffer in self._buffers]

    def reserve(self, length: int, active: int) -> None:
        """Makes ``span`` at least ``length``, keeping the first ``active`` slots' contents; shrinks when none is active."""
        wanted = min(-(-length // SPAN_STEP) * SPAN_STEP, self.shape.capacity)
        if wanted == self.span or (active and wanted < self.span):
            return
        old_span, old_views = self.span, self._views
        self.span = wanted
        self._layout()
        for old, new in zip(old_views, self._views, strict=True):
            kept = old[:, :active].clone()
            new.zero_()
            new[:, :active, :, : min(old_span, wanted)] = kept[..., : min(old_span, wanted), :]

    def begin(self, batch: ForwardBatch) -> None:
        """Declares where the next forward's tokens go. Called once a forward, before the model."""
        self.batch = batch
        self._write_index = None

    def _lines_written(self, batch: ForwardBatch) -> torch.Tensor:
        """int64 [B · KV · Q], where each key goes in a layer's keys seen as [slots · KV · span, d]."""
        rows = torch.arange(batch.rows.start, batch.rows.stop, device=self.device)
        heads = torch.arange(self.shape.kv_heads, device=self.device)
        lines = (rows[:, None] * self.shape.kv_heads + heads)[:, :, None] * self.span
        return (lines + batch.positions[:, None, :]).reshape(-1)

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: object, **kwargs: object
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
        """A layer's keys and values, [2, slots, KV, span, d] and contiguous, for kernels that write and read in place."""
        return self._views[layer_idx]

    def write_taps(self, batch: ForwardBatch, taps: torch.Tensor) -> None:
        """Stores features [B, Q, taps] of the batch's tokens."""
        rows = torch.arange(batch.rows.start, batch.rows.stop, device=self.device)[:, None]
        self.taps[rows, batch.positions] = taps

    def copy_slot(self, source: int, targets: Sequence[int], length: int) -> None:
        """Copies the first ``length`` tokens of one slot to others."""
        for view in self._views:
            view[:, targets, :, :length] = view[:, source : source + 1, :, :length]
        self.taps[targets, :length] = self.taps[source : source + 1, :length]

    def clear_slot(self, slot: int) -> None:
        """Zeroes a slot. Needed after a sequence with NaN: a masked key of weight 0 times NaN is NaN."""
        for view in self._views:
            view[:, slot] = 0
        self.taps[slot] = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Sequences differ in length, so positions are always given and this is never the answer to anything: 0."""
        return 0
