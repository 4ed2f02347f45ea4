"""Which shapes are captured, and what that takes, before anything is captured.

A strategy that verifies many tokens pays at small batches only (TLT, arXiv 2511.16665: a graph for every
strategy and every batch takes the memory that the KV cache needs). So tokens per sequence are captured up to
a number of *rows*, batch × tokens, past which no speculation could pay; the number of graphs is then a sum
over strategies, not a product.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

# what CUDA keeps for one kernel of an instantiated graph; `launch/bench.py gpu` compares plan and fact
NODE_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True, order=True)
class GraphKey:
    """A bucket of forwards that share a captured graph.

    Attributes:
        phase: ``target`` or ``draft``.
        batch: Sequences.
        tokens: Of each sequence.
        span: Keys that attention reads.
    """

    phase: str
    batch: int
    tokens: int
    span: int

    @property
    def rows(self) -> int:
        return self.batch * self.tokens


@dataclass(frozen=True, slots=True)
class ModelShape:
    """What activations of a forward depend on.

    Attributes:
        layers, hidden, intermediate, heads, kv_heads, head_dim, vocab: Of the model.
        bytes_per_value: 2 for bfloat16.
    """

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    bytes_per_value: int = 2

    def activation_bytes(self, key: GraphKey) -> int:
        """Most bytes alive at once in a forward of ``key``, inputs and outputs apart.

        Within a layer that is the residual stream and the widest of its stages: joined projections, attention
        scores in float32 over the span, or gate and up beside their product. At the end it is the logits.
        """
        attention = (self.heads + 2 * self.kv_heads) * self.head_dim * 2
        scores = self.heads * key.span * 3
        mlp = 3 * self.intermediate
        widest = max(attention + scores, mlp, self.vocab)
        return key.rows * (2 * self.hidden + widest) * self.bytes_per_value

    def output_bytes(self, rows: int) -> int:
        """Bytes of the logits of ``rows`` tokens, which outlive the forward."""
        return rows * self.vocab * self.bytes_per_value

    @property
    def kernels(self) -> int:
        """Kernels of one forward: about sixteen a layer, and a dozen around them."""
        return 16 * self.layers + 12


def powers_of_two(limit: int) -> tuple[int, ...]:
    """1, 2, 4, … and ``limit`` itself."""
    below = [1 << i for i in range(limit.bit_length()) if 1 << i < limit]
    return (*below, limit)


def smallest_bucket(value: int, buckets: Sequence[int]) -> int | None:
    """The smallest bucket that holds ``value``; None when none does. ``buckets`` increase."""
    return next((b for b in buckets if b >= value), None)


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """The keys to capture, largest first, and their bytes.

    Graphs replay one at a time, so all share one memory pool as large as the largest needs, and one buffer of
    logits; each adds its kernels.
    """

    keys: tuple[GraphKey, ...]
    pool_bytes: int
    output_bytes: int
    node_bytes: int

    @property
    def total_bytes(self) -> int:
        return self.pool_bytes + self.output_bytes + self.node_bytes


def plan_keys(
    phase: str, batches: Sequence[int], tokens: Sequence[int], spans: Sequence[int], max_rows: int
) -> tuple[GraphKey, ...]:
    """Keys with at most ``max_rows`` rows, and those of one token at every batch; largest first, so that
    later ones fit in.
    """
    every = (GraphKey(phase, b, t, span) for b, t, span in itertools.product(batches, tokens, spans))
    return tuple(
        sorted(
            (k for k in every if k.tokens == 1 or k.rows <= max_rows),
            key=lambda k: (k.rows, k.span),
            reverse=True,
        )
    )


def plan_graphs(shape: ModelShape, keys: Sequence[GraphKey]) -> GraphPlan:
    """The bytes of capturing ``keys`` into one pool."""
    if not keys:
        return GraphPlan((), 0, 0, 0)
    return GraphPlan(
        keys=tuple(keys),
        pool_bytes=max(shape.activation_bytes(k) for k in keys),
        output_bytes=shape.output_bytes(max(k.rows for k in keys)),
        node_bytes=len(keys) * shape.kernels * NODE_BYTES,
    )


def naive_bytes(shape: ModelShape, strategies: Sequence[int], batches: Sequence[int], span: int) -> int:
    """Bytes when each strategy (tokens to verify) captures every batch for itself, as an engine with one
    strategy does: within a strategy the graphs share a pool, between strategies nothing is shared.
    """
    plans = [
        plan_graphs(shape, [GraphKey("target", b, tokens, span) for b in batches]) for tokens in strategies
    ]
    return sum(plan.total_bytes for plan in plans)
