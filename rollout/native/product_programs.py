"""Triton programs of a decoder layer's matrix products, and of what adds their parts.

`paceline.rollout.native.triton_kernels` launches them with `paceline.rollout.native.gpu_tiles`. Sums of
parts are float32 [parts, N, outputs]; whoever reads them adds them in order.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def wait_for_inputs(PDL: tl.constexpr):
    """Lets the next program start, then waits for the results of the programs before.

    With ``PDL`` (programmatic dependent launch, from Hopper on) a program's blocks are placed on the GPU
    while the program before is still running. Each program must wait, even if it reads nothing of the one
    before, because a program further back may still be reading what it overwrites.
    """
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


@triton.jit
def fetch(at):
    """Reads the memory at pointers into the L2 cache, without waiting for it."""
    tl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def summed(sums, offset, step, mask, PARTS: tl.constexpr):
    """Adds the parts at ``offset`` of sums that lie ``step`` apart, in order."""
    total = tl.load(sums + offset, mask=mask, other=0.0)
    for part in tl.static_range(1, PARTS):
        total += tl.load(sums + part * step + offset, mask=mask, other=0.0)
    return total.to(tl.float32)


@triton.jit(do_not_specialize=["rows"])
def multiply(
    x, first, second, third, first_bias, second_bias, third_bias, out,
    rows, first_outputs, second_outputs, outputs, inputs, length,
    TOKENS: tl.constexpr, OUTPUTS: tl.constexpr, STEP: tl.constexpr, PARTS: tl.constexpr,
    GATED: tl.constexpr, BIAS: tl.constexpr, RAGGED: tl.constexpr,
    LINE: tl.constexpr, AHEAD: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Multiplies tokens [rows, inputs] by the weights [outputs, inputs] of up to three layers.

    Program (t, o, p) takes the t-th block of tokens, the o-th of outputs, and ``PARTS`` parts of the inputs
    from p · PARTS on, whose sum goes to ``out`` [·, rows, outputs]. The weights are the left operand, so that
    few tokens leave no rows of the instruction empty. With ``GATED`` the layers are gate and up, half of the
    block each, and silu(gate) · up goes to ``out`` [rows, outputs].
    """
    at, k = tl.arange(0, OUTPUTS), tl.arange(0, STEP)
    half: tl.constexpr = OUTPUTS // 2
    if GATED:
        column = tl.program_id(1) * half + at % half
        lane = tl.minimum(column, outputs - 1).to(tl.int64)
        line = tl.where(at < half, first + lane * inputs, second + lane * inputs)
        bias = tl.where(at < half, first_bias + lane, second_bias + lane)
    else:
        column = tl.program_id(1) * OUTPUTS + at
        lane = tl.minimum(column, outputs - 1).to(tl.int64)
        in_second, in_third = lane - first_outputs, lane - first_outputs - second_outputs
        line = tl.where(in_third < 0, second + in_second * inputs, third + in_third * inputs)
        line = tl.where(in_second < 0, first + lane * inputs, line)
        bias = tl.where(in_third < 0, second_bias + in_second, third_bias + in_third)
        bias = tl.where(in_second < 0, first_bias + lane, bias)
    part = tl.program_id(2) * PARTS
    if PDL:
        # the first weights do not depend on the programs before
        ahead = part * length + tl.arange(0, AHEAD) * LINE
        fetch(line[:, None] + tl.minimum(ahead, inputs - 1)[None, :])
    wait_for_inputs(PDL)
    token = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    there = (token < rows)[None, :]
    weights, values = line[:, None] + k[None, :], x + token[None, :] * inputs + k[:, None]
    total = tl.zeros([OUTPUTS, TOKENS], dtype=tl.float32)
    if BIAS:
        total += tl.where(part == 0, tl.load(bias).to(tl.float32), 0.0)[:, None]
    for each in range(PARTS):
        begin = (part + each) * length
        acc = tl.zeros([OUTPUTS, TOKENS], dtype=tl.float32)
        for start in range(begin, tl.minimum(begin + length, inputs), STEP):
            if RAGGED:
                inside = start + k < inputs
                w = tl.load(weights + start, mask=inside[None, :], other=0.0)
                v = tl.load(values + start, mask=there & inside[:, None], other=0.0)
            else:
                w = tl.load(weights + start)
                v = tl.load(values + start, mask=there, other=0.0)
            acc = tl.dot(w, v, acc, input_precision="ieee")
        total += acc
    if GATED:
        gate, up = tl.split(tl.permute(tl.reshape(total, [2, half, TOKENS]), [1, 2, 0]))
        total = gate / (1.0 + tl.exp(-gate)) * up
        column = tl.program_id(1) * half + tl.arange(0, half)
    target = out + (tl.program_id(2) * rows + token)[None, :] * outputs + column[:, None]
    tl.store(target, total.to(out.dtype.element_ty), mask=there & (column < outputs)[:, None])


@triton.jit
def add(
    sums, residual, out, count, PARTS: tl.constexpr, RESIDUAL: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Adds the parts of ``count`` sums, and the residual to them."""
    wait_for_inputs(PDL)
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < count
    total = summed(sums, at, count, inside, PARTS)
    if RESIDUAL:
        total += tl.load(residual + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def add_norm(
    sums, residual, gain, out, normed, width, eps, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Adds parts and residual of row ``program_id(0)``, and normalizes the result as `rms_norm` does."""
    wait_for_inputs(PDL)
    at = tl.arange(0, BLOCK)
    inside = at < width
    offset = tl.program_id(0).to(tl.int64) * width + at
    step = tl.num_programs(0).to(tl.int64) * width
    total = summed(sums, offset, step, inside, PARTS)
    total += tl.load(residual + offset, mask=inside, other=0.0).to(tl.float32)
    rounded = total.to(out.dtype.element_ty)
    tl.store(out + offset, rounded, mask=inside)
    values = rounded.to(tl.float32)
    scale = tl.rsqrt(tl.sum(values * values, 0) / width + eps)
    gains = tl.load(gain + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(normed + offset, (values * scale * gains).to(normed.dtype.element_ty), mask=inside)
