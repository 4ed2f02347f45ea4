"""Triton programs of the decode kernels on a GPU: what lies between a decoder layer's matrix products.

`paceline.rollout.native.triton_kernels` launches them. Values are float32 or bfloat16 in memory and float32
in registers. A token is described by a column of a `DeviceTokens` table, whose rows are named `SLOT` …
`ANCESTORS`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from paceline.rollout.native.product_programs import summed, wait_for_inputs

SLOT = tl.constexpr(0)
LOCAL_POSITION = tl.constexpr(1)
PLACE = tl.constexpr(3)
TRUNK = tl.constexpr(4)
ANCESTORS = tl.constexpr(5)


@triton.jit
def rms_norm(x, gain, out, width, eps, BLOCK: tl.constexpr, PDL: tl.constexpr):
    """Normalizes row ``program_id(0)`` of ``x`` by its root mean square and multiplies it by the gain."""
    wait_for_inputs(PDL)
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    inside = at < width
    values = tl.load(x + row * width + at, mask=inside, other=0.0).to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    gains = tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + row * width + at, (values * scale * gains).to(out.dtype.element_ty), mask=inside)


@triton.jit
def rotate_and_store(
    sums, cosines, sines, query_gain, key_gain, out, cache, pages, table, tokens,
    page_step, half_step, head_step, parts, page, eps,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK: tl.constexpr, NORM: tl.constexpr,
    PARTS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Rotates one head of one token: a query goes to ``out``, a key or a value to its place in the cache.

    ``sums`` [PARTS, N, (H + 2 KV) · d] are parts of queries, keys and values side by side.
    """
    wait_for_inputs(PDL)
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    at = tl.arange(0, BLOCK)
    inside = at < DIM
    rolled = (at + DIM // 2) % DIM
    is_query, is_key = head < HEADS, (head >= HEADS) & (head < HEADS + KV_HEADS)
    width: tl.constexpr = (HEADS + 2 * KV_HEADS) * DIM
    source, step = token * width + head * DIM, tokens * width
    x = summed(sums, source + at, step, inside, PARTS)
    if is_query | is_key:
        other = summed(sums, source + rolled, step, inside, PARTS)
        if NORM:
            if is_query:  # noqa: SIM108  (Triton's compiler wants statements)
                gain = query_gain
            else:
                gain = key_gain
            scale = tl.rsqrt(tl.sum(x * x, 0) / DIM + eps)
            x = x * scale * tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)
            other = other * scale * tl.load(gain + rolled, mask=inside, other=0.0).to(tl.float32)
            x = x.to(out.dtype.element_ty).to(tl.float32)
            other = other.to(out.dtype.element_ty).to(tl.float32)
        cos = tl.load(cosines + token * DIM + at, mask=inside, other=0.0).to(tl.float32)
        sin = tl.load(sines + token * DIM + at, mask=inside, other=0.0).to(tl.float32)
        x = x * cos + tl.where(at < DIM // 2, -other, other) * sin
    if is_query:
        target = out + (token * HEADS + head) * DIM
    else:
        slot, place = tl.load(table + SLOT * tokens + token), tl.load(table + PLACE * tokens + token)
        lane = tl.where(is_key, head - HEADS, head - HEADS - KV_HEADS).to(tl.int64)
        half = tl.where(is_key, 0, 1).to(tl.int64)
        number = tl.load(pages + slot * parts + place // page).to(tl.int64)
        target = cache + number * page_step + half * half_step + lane * head_step + place % page * DIM
    tl.store(target + at, x.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _attend_block(query, keys, values, visible, acc, highest, total, scale, softcap, SOFTCAP: tl.constexpr):
    """Adds a block of keys to a running softmax (FlashAttention, arXiv 2205.14135, algorithm 1)."""
    scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale
    if SOFTCAP:
        scores = softcap * (2.0 / (1.0 + tl.exp(-2.0 * scores / softcap)) - 1.0)
    scores = tl.where(visible[None, :], scores, float("-inf"))
    new_highest = tl.maximum(highest, tl.max(scores, 1))
    base = tl.where(new_highest == float("-inf"), 0.0, new_highest)  # nothing seen so far
    weights = tl.exp(scores - base[:, None])
    kept = tl.exp(highest - base)
    total = total * kept + tl.sum(weights, 1)
    acc = acc * kept[:, None] + tl.dot(weights.to(values.dtype), values, input_precision="ieee")
    return acc, new_highest, total


@triton.jit
def _merge(acc, highest, total, new_acc, new_highest, new_total):
    """Adds a part's softmax to those before it (Flash-Decoding), by the same operations everywhere."""
    top = tl.maximum(highest, new_highest)
    base = tl.where(top == float("-inf"), 0.0, top)
    kept, added = tl.exp(highest - base), tl.exp(new_highest - base)
    acc = tl.fma(acc, kept[:, None], new_acc * added[:, None])
    return acc, top, tl.fma(total, kept, new_total * added)


@triton.jit(do_not_specialize=["tokens"])
def attend(
    query, cache, out, partial, pages, table, tokens, page_step, half_step, head_step, parts, page,
    scale, softcap,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr, FOLDED: tl.constexpr,
    WINDOW: tl.constexpr, SOFTCAP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attends with the query heads of one token and key head to the keys that the token sees.

    The keys are split into ``SPLITS`` parts by the token's place alone, so that its result does not depend on
    the forward that it is in. With ``FOLDED`` a program runs all parts, and the result goes to ``out``
    [N, H, d]. Otherwise it runs one, and the unnormalised sum, the highest score and the sum of weights go to
    ``partial`` [SPLITS, N, H, d + 2], for `combine`.
    """
    wait_for_inputs(PDL)
    token, lane = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64)
    group: tl.constexpr = HEADS // KV_HEADS
    slot = tl.load(table + SLOT * tokens + token)
    trunk = tl.load(table + TRUNK * tokens + token)
    first = 0 * trunk
    if WINDOW > 0:
        first = tl.maximum(tl.load(table + LOCAL_POSITION * tokens + token) - WINDOW + 1, 0)
    rows, at, near = tl.arange(0, ROWS), tl.arange(0, BLOCK_D), tl.arange(0, KEYS)
    head = lane * group + rows
    row_mask = (rows < group)[:, None] & (at < DIM)[None, :]
    q = tl.load(query + (token * HEADS + head)[:, None] * DIM + at[None, :], mask=row_mask, other=0.0)
    lines = cache + lane * head_step
    ancestors = tl.load(table + ANCESTORS * tokens + token)
    length = tl.cdiv(tl.cdiv(tl.maximum(trunk - first, 0), SPLITS), KEYS) * KEYS
    acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
    highest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)
    for each in range(SPLITS if FOLDED else 1):
        part = tl.program_id(2) + each
        part_acc = tl.zeros([ROWS, BLOCK_D], dtype=tl.float32)
        part_highest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
        part_total = tl.zeros([ROWS], dtype=tl.float32)
        begin = first + part * length
        end = tl.minimum(begin + length, trunk)
        # the last part also reads the ancestors' places, which lie behind the trunk
        nodes = tl.where((part == SPLITS - 1) & (ancestors != 0), 64, 0)
        blocks = tl.cdiv(tl.maximum(end - begin, 0), KEYS)
        for block in range(0, blocks + nodes // KEYS):
            place = begin + block * KEYS + near
            visible = place < end
            if block >= blocks:
                bit = (block - blocks) * KEYS + near
                visible = ((ancestors >> bit) & 1) != 0
                place = trunk + bit
            mask = visible[:, None] & (at < DIM)[None, :]
            number = tl.load(pages + slot * parts + place // page, mask=visible, other=0).to(tl.int64)
            offset = (number * page_step + place % page * DIM)[:, None] + at[None, :]
            k = tl.load(lines + offset, mask=mask, other=0.0)
            v = tl.load(lines + half_step + offset, mask=mask, other=0.0)
            part_acc, part_highest, part_total = _attend_block(
                q, k, v, visible, part_acc, part_highest, part_total, scale, softcap, SOFTCAP
            )
        acc, highest, total = _merge(acc, highest, total, part_acc, part_highest, part_total)
    if FOLDED:
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        target = out + (token * HEADS + head)[:, None] * DIM + at[None, :]
        tl.store(target, acc.to(out.dtype.element_ty), mask=row_mask)
    else:
        line = partial + ((tl.program_id(2) * tokens + token) * HEADS + head) * (DIM + 2)
        tl.store(line[:, None] + at[None, :], acc, mask=row_mask)
        tl.store(line + DIM, highest, mask=rows < group)
        tl.store(line + DIM + 1, total, mask=rows < group)


@triton.jit
def combine(
    partial, out, lines, DIM: tl.constexpr, BLOCK_D: tl.constexpr, SPLITS: tl.constexpr, PDL: tl.constexpr
):  # fmt: skip
    """Joins the parts of one query's attention, ``program_id(0)`` of ``lines``, in order."""
    wait_for_inputs(PDL)
    line, at, one = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK_D)[None, :], tl.arange(0, 1)
    acc = tl.zeros([1, BLOCK_D], dtype=tl.float32)
    highest, total = tl.full([1], float("-inf"), dtype=tl.float32), tl.zeros([1], dtype=tl.float32)
    for part in tl.static_range(SPLITS):
        base = partial + (part * lines + line) * (DIM + 2) + one
        sums = tl.load(base[:, None] + at, mask=at < DIM, other=0.0)
        acc, highest, total = _merge(acc, highest, total, sums, tl.load(base + DIM), tl.load(base + DIM + 1))
    acc = acc / tl.where(total > 0, total, 1.0)[:, None]
    tl.store(out + line * DIM + at, acc.to(out.dtype.element_ty), mask=at < DIM)
