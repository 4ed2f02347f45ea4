"""Captured forwards by shape bucket: CUDA graphs on a GPU, in one memory pool."""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import torch

from paceline.rollout.graphs.captures import Captures
from paceline.rollout.graphs.graph_plan import GraphKey, GraphPlan, smallest_bucket

Forward = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor | None, int], tuple[torch.Tensor, torch.Tensor | None]
]


class Capturer(Protocol):
    """Turns a function of fixed tensors into a replay that reads and writes the same memory each time."""

    def capture(self, forward: Callable[[], None]) -> Callable[[], None]:
        """Returns a function that replays ``forward``.

        Args:
            forward: Function that reads its inputs from and writes its outputs to tensors that stay in place.
        """
        ...


class CudaCapturer:
    """Captures CUDA graphs that share one memory pool.

    Sharing is safe because only one graph replays at a time and outputs are copied out inside the graph.

    Args:
        device: Device of the graphs; it need not be the current one.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        # one stream for everything, because cuBLAS keeps a workspace of 32 MiB for each that it has seen
        self._stream = torch.cuda.Stream(device)

    def capture(self, forward: Callable[[], None]) -> Callable[[], None]:
        """Captures ``forward`` after two warm-up runs; returns the graph's replay."""
        stream, graph = self._stream, torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device):
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(2):  # lets libraries choose kernels and allocate workspaces before the capture
                    forward()
            # other threads (NCCL's watchdog, a drafter in training) may use the GPU meanwhile
            with (
                _without_collector(),
                torch.cuda.graph(graph, pool=self._pool, stream=stream, capture_error_mode="thread_local"),
            ):
                forward()
            torch.cuda.current_stream().wait_stream(stream)
        return graph.replay


@contextmanager
def _without_collector() -> Iterator[None]:
    """Pauses Python's garbage collector.

    It might find the graphs of an engine that is gone. Destroying a graph while another is captured fails
    that capture, and leaves the generator of random numbers unusable.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class PlainCapturer:
    """Stands in for a capturer on devices without graphs by running the function itself."""

    def capture(self, forward: Callable[[], None]) -> Callable[[], None]:
        """Returns ``forward`` itself."""
        return forward


def seat_padding(span: int) -> Sequence[int]:
    """Returns the seat of padding as in `ForwardBatch`; it writes to the last place, which nothing reads."""
    return span - 1, span - 1, span, 0


@dataclass(slots=True)
class _Captured:
    """Holds the input tensors of a captured forward, the seat of its padding and its replay."""

    tokens: torch.Tensor
    seats: torch.Tensor
    padding: torch.Tensor
    replay: Callable[[], None]


class GraphPool:
    """Runs decode forwards through captured graphs of their shape bucket.

    `capture_planned` captures the plan. Another shape is captured when it first occurs, if its rows fit in
    the output buffer. If a shape fits no bucket or its capture failed, the caller runs the forward itself,
    and `fallbacks` counts the reasons. A failed capture is not tried again.

    Graphs read weights in place, so an in-place update needs no new capture; weights that have moved do
    (`follow`).

    Args:
        forward: Function (tokens [B, Q], seats [S, B, Q], carried [B, Q, carry] or None, span) → logits [B,
            Q, V] and the state carried to the next forward, for whole buckets.
        plan: Plan of what to capture.
        vocab: Size of the logits.
        carry: Width of a hidden state that goes in and comes out (a drafter's); 0 for none.
        dtype: Dtype of the logits.
        device: Device of the logits.
        capturer: Capturer to use.
        padding: Function from the span to the S numbers of a padding token's seat.
    """

    def __init__(
        self,
        forward: Forward,
        plan: GraphPlan,
        *,
        vocab: int,
        carry: int = 0,
        dtype: torch.dtype,
        device: torch.device,
        capturer: Capturer,
        padding: Callable[[int], Sequence[int]] = seat_padding,
    ) -> None:
        self.plan, self._padding = plan, padding
        self.replays: Counter[GraphKey] = Counter()
        self._forward, self._capturer, self._device = forward, capturer, device
        self._batches = sorted({k.batch for k in plan.keys})
        self._tokens = sorted({k.tokens for k in plan.keys})
        rows = max((k.rows for k in plan.keys), default=0)
        self._phase = next((k.phase for k in plan.keys), "")
        self._logits = torch.zeros(rows, vocab, dtype=dtype, device=device)
        self._carried = torch.zeros(rows, carry, dtype=dtype, device=device)
        self._captures: Captures[GraphKey, _Captured] = Captures(self._capture)

    @property
    def fallbacks(self) -> Counter[str]:
        """Reasons why forwards ran outside the graphs, with their counts."""
        return self._captures.fallbacks

    @property
    def rows(self) -> int:
        """The largest number of tokens that a captured forward has."""
        return len(self._logits)

    def follow(self, addresses: tuple[int, ...]) -> None:
        """Captures anew if the weights that the forward reads have moved, see `Captures.follow`."""
        self._captures.follow(addresses, self.plan.keys)

    @property
    def captured(self) -> tuple[GraphKey, ...]:
        """The buckets that have been captured."""
        return self._captures.keys

    def capture_planned(self) -> None:
        """Captures the plan, largest graph first."""
        for key in self.plan.keys:
            self._captures.get(key)

    def key_for(self, batch: int, tokens: int, span: int, slots: int) -> GraphKey | None:
        """Returns the bucket of a shape, no wider than the cache has slots; None if it fits none."""
        batch_bucket, token_bucket = (
            smallest_bucket(batch, self._batches),
            smallest_bucket(tokens, self._tokens),
        )
        if batch_bucket is None or token_bucket is None:
            return None
        return GraphKey(self._phase, min(batch_bucket, max(slots, batch)), token_bucket, span)

    def most_tokens(self, batch: int, span: int, slots: int) -> int:
        """Returns how many tokens of each of ``batch`` sequences fit a captured forward, see `key_for`."""
        keys = [self.key_for(batch, tokens, span, slots) for tokens in self._tokens]
        return max((key.tokens for key in keys if key is not None and key.rows <= self.rows), default=1)

    def run(
        self,
        tokens: torch.Tensor,
        seats: torch.Tensor,
        span: int,
        slots: int,
        carried: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Replays the bucket of a forward.

        Args:
            tokens: Token ids of the first B slots, int64 [B, Q].
            seats: Seats of the tokens, int64 [S, B, Q].
            span: Current span of the cache.
            slots: Number of slots that the cache has at this span; the bucket's rows past B write to free
                slots.
            carried: State carried into the forward, [B, Q, carry]; None if there is none.

        Returns:
            Logits [B, Q, V] and the carried state [B, Q, carry], both valid until the next call, or None if
            the caller must run the forward itself.
        """
        batch, width = tokens.shape
        key = self.key_for(batch, width, span, slots)
        if key is None or key.rows > self.rows:
            self.fallbacks["more sequences or tokens than any captured shape"] += 1
            return None
        captured = self._captures.get(key)
        if captured is None:
            return None
        if (batch, width) != (key.batch, key.tokens):
            captured.seats.copy_(captured.padding)
        captured.seats[:, :batch, :width].copy_(seats, non_blocking=True)
        captured.tokens[:batch, :width].copy_(tokens, non_blocking=True)
        state = self._carried[: key.rows].view(key.batch, key.tokens, self._carried.shape[-1])[:batch, :width]
        if carried is not None:
            state.copy_(carried)
        captured.replay()
        self.replays[key] += 1
        return self._logits[: key.rows].view(key.batch, key.tokens, -1)[:batch, :width], state

    @torch.no_grad()
    def _capture(self, key: GraphKey) -> _Captured:
        """Captures a bucket over freshly allocated input tensors."""
        tokens = torch.zeros(key.batch, key.tokens, dtype=torch.long, device=self._device)
        padding = torch.tensor(self._padding(key.span), device=self._device)[:, None, None]
        seats = padding.expand(-1, *tokens.shape).contiguous()
        out = self._logits[: key.rows].view(key.batch, key.tokens, -1)
        state = self._carried[: key.rows].view(key.batch, key.tokens, self._carried.shape[-1])
        carries = state.shape[-1] > 0

        def forward() -> None:
            logits, carried = self._forward(tokens, seats, state if carries else None, key.span)
            out.copy_(logits)
            if carried is not None:
                state.copy_(carried)

        return _Captured(tokens, seats, padding, self._capturer.capture(forward))
