"""Planning of captured graphs: which shapes to capture, and the memory that takes.

A strategy that verifies many tokens pays off at small batches only (TLT, arXiv 2511.16665: one graph for
every strategy and every batch size takes the memory that the KV cache needs). Larger token counts per
sequence are therefore captured only up to a number of *rows*, batch × tokens, past which no speculation could
pay off. The number of graphs is then a sum over strategies, not a product.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

from paceline.rollout.native.gpu_tiles import attention_sums, product_tiles

# largest captured batch × tokens; drafts are cut to it, because the tokens of a larger forward are limited by
# arithmetic and cost more than they gain
MOST_ROWS = 512
# memory of one kernel in an instantiated CUDA graph; `paceline gpu-check` compares plan and measurement
NODE_BYTES = 16 * 1024


@dataclass(frozen=True, slots=True, order=True)
class GraphKey:
    """Identifies a bucket of forwards that share a captured graph.

    Attributes:
        phase: ``target`` or ``draft``.
        batch: Number of sequences.
        tokens: Number of tokens per sequence.
        span: Number of keys that attention reads.
    """

    phase: str
    batch: int
    tokens: int
    span: int

    @property
    def rows(self) -> int:
        """The number of tokens in the forward, batch × tokens."""
        return self.batch * self.tokens


@dataclass(frozen=True, slots=True)
class ModelShape:
    """Holds the sizes that the activations of a forward depend on.

    Attributes:
        layers: Number of decoder layers.
        hidden: Hidden size.
        intermediate: Width of the MLP.
        heads: Number of query heads.
        kv_heads: Number of key/value heads.
        head_dim: Size of a head.
        vocab: Vocabulary size.
        bytes_per_value: Bytes per activation; 2 for bfloat16.
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
        """Returns the peak activation bytes of a forward of ``key``, not counting inputs and outputs.

        Within a layer these are the residual stream and the widest of the stages: joined projections and
        attention scores in float32 over the span, or gate and up beside their product. At the end they are
        the logits. Beside one of them are float32 sums, of the parts of a product or of attention.
        """
        attention = (self.heads + 2 * self.kv_heads) * self.head_dim * 2
        scores = self.heads * key.span * 3
        mlp = 3 * self.intermediate
        widest = max(attention + scores, mlp, self.vocab)
        values = (2 * self.hidden + widest) * self.bytes_per_value
        return key.rows * (values + 4 * self._sums(key.rows))

    def _sums(self, rows: int) -> int:
        """Returns the most float32 values that a kernel of a layer leaves to the next for each row."""
        queries = self.heads * self.head_dim
        joined = queries + 2 * self.kv_heads * self.head_dim
        products = (joined, self.hidden), (self.hidden, queries), (self.hidden, self.intermediate)
        written = [
            product_tiles(outputs, inputs, rows, self.bytes_per_value).written * outputs
            for outputs, inputs in products
        ]
        return max(*written, attention_sums(rows, self.kv_heads) * self.heads * (self.head_dim + 2))

    def output_bytes(self, rows: int) -> int:
        """Returns the bytes of the logits of ``rows`` tokens, which outlive the forward."""
        return rows * self.vocab * self.bytes_per_value

    @property
    def kernels(self) -> int:
        """The number of kernels in one forward: ten per layer, and about twenty around them."""
        return 10 * self.layers + 20


def powers_of_two(limit: int) -> tuple[int, ...]:
    """Returns 1, 2, 4, … and ``limit`` itself."""
    below = [1 << i for i in range(limit.bit_length()) if 1 << i < limit]
    return (*below, limit)


def token_buckets(limit: int) -> tuple[int, ...]:
    """Returns numbers of tokens up to ``limit``, each at most half as large again as the one before."""
    buckets = [1, 2, 4]
    while buckets[-1] < limit:
        power = 1 << (buckets[-1].bit_length() - 1)
        buckets.append(power * 3 // 2 if buckets[-1] == power else power * 2)
    return tuple(buckets)


def smallest_bucket(value: int, buckets: Sequence[int]) -> int | None:
    """Returns the smallest of the increasing ``buckets`` that holds ``value``, or None if none does."""
    return next((b for b in buckets if b >= value), None)


@dataclass(frozen=True, slots=True)
class GraphPlan:
    """Lists the graphs to capture, largest first, and their bytes.

    Graphs replay one at a time, so all share one memory pool as large as the largest needs, and one buffer of
    logits; each adds its own kernels.

    Attributes:
        keys: Buckets to capture.
        pool_bytes: Bytes of the shared memory pool.
        output_bytes: Bytes of the shared logits buffer.
        node_bytes: Bytes of the kernels of all graphs.
    """

    keys: tuple[GraphKey, ...]
    pool_bytes: int
    output_bytes: int
    node_bytes: int

    @property
    def total_bytes(self) -> int:
        """The bytes of the whole plan."""
        return self.pool_bytes + self.output_bytes + self.node_bytes


def plan_keys(
    phase: str, batches: Sequence[int], tokens: Sequence[int], spans: Sequence[int], max_rows: int
) -> tuple[GraphKey, ...]:
    """Returns the buckets of at most ``max_rows`` rows, and those of one token at every batch size.

    They are sorted largest first, so that later graphs fit into the pool of earlier ones.

    Args:
        phase: ``target`` or ``draft``.
        batches: Batch sizes to combine.
        tokens: Token counts per sequence to combine.
        spans: Spans to combine.
        max_rows: Maximum batch × tokens if there is more than one token per sequence.
    """
    candidates = (GraphKey(phase, b, t, span) for b, t, span in itertools.product(batches, tokens, spans))
    return tuple(
        sorted(
            (k for k in candidates if k.tokens == 1 or k.rows <= max_rows),
            key=lambda k: (k.rows, k.span),
            reverse=True,
        )
    )


def plan_graphs(shape: ModelShape, keys: Sequence[GraphKey]) -> GraphPlan:
    """Returns the plan for capturing ``keys`` into one pool, with its bytes."""
    if not keys:
        return GraphPlan((), 0, 0, 0)
    return GraphPlan(
        keys=tuple(keys),
        pool_bytes=max(shape.activation_bytes(k) for k in keys),
        output_bytes=shape.output_bytes(max(k.rows for k in keys)),
        node_bytes=len(keys) * shape.kernels * NODE_BYTES,
    )


def naive_bytes(shape: ModelShape, strategies: Sequence[int], batches: Sequence[int], span: int) -> int:
    """Returns the bytes needed if each strategy captured every batch size for itself.

    This is what an engine with a single strategy does: graphs of one strategy share a pool, but different
    strategies share nothing.

    Args:
        shape: Sizes of the model.
        strategies: Tokens per sequence that each strategy verifies.
        batches: Batch sizes.
        span: Number of keys that attention reads.
    """
    plans = [
        plan_graphs(shape, [GraphKey("target", b, tokens, span) for b in batches]) for tokens in strategies
    ]
    return sum(plan.total_bytes for plan in plans)
