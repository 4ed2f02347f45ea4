"""Triton programs that sample tokens and accept drafts on a GPU.

`paceline.rollout.native.triton_kernels` launches them. One program for each block of each row of logits sums
its weights (`weigh_blocks`); then one for each row samples its token (`draw`), or one for each sequence
samples along the path of its draft that is accepted (`follow`).
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def weigh_blocks(logits, numbers, blocks, vocab, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """Prepares the sampling of block ``program_id(1)`` of row ``program_id(0)``.

    ``numbers`` begins with the rows' temperatures, float64 [R]. ``blocks`` is float32 [R, 4, COUNT]: the
    largest logit of each block, its index, the sum of the weights relative to it, and how many logits are not
    finite.
    """
    row, block = tl.program_id(0).to(tl.int64), tl.program_id(1)
    temperature = tl.load(numbers + row).to(tl.float32)
    scale = 1.0 / tl.where(temperature == 0.0, 1.0, temperature)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < vocab
    x = tl.load(logits + row * vocab + at, mask=inside, other=float("-inf")).to(tl.float32)
    top = tl.max(x, 0)
    target = blocks + row * 4 * COUNT + block
    tl.store(target, top)
    tl.store(target + COUNT, tl.min(tl.where(x == top, at, vocab), 0).to(tl.float32))
    tl.store(target + 2 * COUNT, tl.sum(tl.exp((x - top) * scale), 0))
    tl.store(target + 3 * COUNT, tl.sum(tl.where(inside & ~(tl.abs(x) < float("inf")), 1.0, 0.0), 0))


@triton.jit
def _sample(logits, blocks, row, temperature, uniform, vocab, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """Samples from softmax(logits[row] / temperature) by inverting the cumulative sum.

    Sums over blocks are float64, so that small probabilities are not lost. Returns the token and its
    log-prob, NaN if a logit of the row is not finite.
    """
    greedy = temperature == 0.0
    scale = 1.0 / tl.where(greedy, 1.0, temperature)
    block = tl.arange(0, COUNT)
    real = block * BLOCK < vocab
    source = blocks + row * 4 * COUNT + block
    highest = tl.load(source, mask=real, other=float("-inf"))
    best = tl.load(source + COUNT, mask=real, other=0.0)
    sums = tl.load(source + 2 * COUNT, mask=real, other=0.0)
    broken = tl.sum(tl.load(source + 3 * COUNT, mask=real, other=0.0), 0)
    top = tl.max(highest, 0)
    likeliest = tl.min(tl.where(real & (highest == top), best, vocab), 0).to(tl.int32)
    # a block whose logits are all -inf has no sum
    weights = tl.where(real & (highest > float("-inf")), sums * tl.exp((highest - top) * scale), 0.0)
    ends = tl.cumsum(weights.to(tl.float64), 0)
    total = tl.max(ends, 0)
    goal = uniform * total
    chosen = tl.minimum(tl.sum(tl.where(ends <= goal, 1, 0), 0), tl.cdiv(vocab, BLOCK) - 1)
    before = tl.max(tl.where(block < chosen, ends, 0.0), 0)
    line, at = logits + row * vocab, chosen * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(line + at, mask=at < vocab, other=float("-inf")).to(tl.float32)
    inside_block = tl.cumsum(tl.exp((x - top) * scale).to(tl.float64), 0)
    index = tl.sum(tl.where(inside_block <= goal - before, 1, 0), 0)
    token = tl.minimum(chosen * BLOCK + index, vocab - 1)
    # rounding can carry the search past the last positive weight
    usable = tl.exp((tl.load(line + token).to(tl.float32) - top) * scale) > 0
    token = tl.where(greedy | ~usable, likeliest, token)
    logprob = (tl.load(line + token).to(tl.float32) - top) * scale - tl.log(total.to(tl.float32))
    return token, tl.where(broken > 0, float("nan"), logprob)


@triton.jit
def draw(logits, numbers, blocks, tokens, logprobs, vocab, rows, BLOCK: tl.constexpr, COUNT: tl.constexpr):
    """Samples row ``program_id(0)``; ``numbers`` is float64 [2, R], temperatures and uniforms."""
    row = tl.program_id(0).to(tl.int64)
    temperature, uniform = tl.load(numbers + row).to(tl.float32), tl.load(numbers + rows + row)
    token, logprob = _sample(logits, blocks, row, temperature, uniform, vocab, BLOCK, COUNT)
    tl.store(tokens + row, token)
    tl.store(logprobs + row, logprob)


@triton.jit
def follow(
    logits, numbers, blocks, drafted, found, vocab, rows, sequences, width,
    BLOCK: tl.constexpr, COUNT: tl.constexpr, NODES: tl.constexpr,
):  # fmt: skip
    """Descends the draft tree of sequence ``program_id(0)`` as long as a child agrees with the token sampled.

    ``numbers`` is float64: temperatures [R] of the rows of logits, uniforms [S, N + 1], each sequence's first
    row [S] and number of nodes [S], and the parents of its nodes [S, N]. ``drafted`` is int64 [S, N].

    ``found`` is float64 [S, 4 N + 3], so that the host fetches it at once: of each sequence the number of
    accepted nodes, these nodes [N], the tokens sampled along the path [N + 1], their log-probs [N + 1] and
    the tokens drafted [N].
    """
    sequence = tl.program_id(0).to(tl.int64)
    uniforms = numbers + rows
    first_rows = uniforms + sequences * (width + 1)
    counts = first_rows + sequences
    first = tl.load(first_rows + sequence).to(tl.int64)
    place = tl.arange(0, NODES)
    inside = place < tl.load(counts + sequence).to(tl.int32)
    nodes = sequence * width + place
    parents = tl.load(counts + sequences + nodes, mask=inside, other=-2.0).to(tl.int32)
    children = tl.load(drafted + nodes, mask=inside, other=-1)
    lengths = found + sequence * (4 * width + 3)
    path = lengths + 1
    tokens = path + width
    logprobs = tokens + width + 1
    tl.store(logprobs + width + 1 + place, children.to(tl.float64), mask=place < width)
    node, depth = tl.full([], -1, tl.int32), tl.full([], 0, tl.int32)
    descends = depth == 0
    while descends:
        row, at = first + 1 + node, sequence * (width + 1) + depth
        temperature, uniform = tl.load(numbers + row).to(tl.float32), tl.load(uniforms + at)
        token, logprob = _sample(logits, blocks, row, temperature, uniform, vocab, BLOCK, COUNT)
        tl.store(tokens + depth, token.to(tl.float64))
        tl.store(logprobs + depth, logprob.to(tl.float64))
        node = tl.min(tl.where((parents == node) & (children == token), place, NODES), 0)
        descends = node < NODES
        tl.store(path + depth, node.to(tl.float64), mask=descends)
        depth += descends.to(tl.int32)
    tl.store(lengths, depth.to(tl.float64))
