"""Stand-ins for the Triton programs: what each computes, in a few of torch's operators.

Triton's interpreter takes a second for a forward that these run in milliseconds. What the programs compute is
tested in tests/rollout/native/test_triton_kernels.py; here they are launched, captured and replayed.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from tests.fake_cuda.device import CudaTensor, FakeDevice, to_host


class Programs:
    """Stands in for the module of Triton programs: ``programs.name[grid](…)`` launches a stand-in."""

    def __init__(self, mode: FakeDevice) -> None:
        self._mode = mode

    def __getattr__(self, name: str) -> Any:
        return _Launcher(self._mode, globals()[f"_{name}"])


class _Launcher:
    def __init__(self, mode: FakeDevice, kernel: Callable[..., None]) -> None:
        self._mode, self._kernel = mode, kernel

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        def launch(*args: Any, **kwargs: Any) -> None:
            tensors = [x for x in args if isinstance(x, torch.Tensor)]
            if not all(isinstance(x, CudaTensor) for x in tensors):
                raise self._mode.mix(self._kernel.__name__, tensors)
            self._mode.launch(self._kernel, tuple(map(to_host, args)), kwargs, tensors)

        return launch


def _rms_norm(x, gain, out, width, eps, **sizes):
    wide = x.float().view(-1, width)
    out.view(-1, width).copy_(wide * (wide.square().mean(-1, keepdim=True) + eps).rsqrt() * gain.float())


def _multiply(
    x, first, second, third, first_bias, second_bias, third_bias, out, rows, first_outputs, second_outputs,
    outputs, inputs, length,
    PARTS, GATED, BIAS, **sizes,
):  # fmt: skip
    third_outputs = 0 if GATED else outputs - first_outputs - second_outputs
    numbers = (first_outputs, second_outputs, third_outputs)
    weights = torch.cat([w[:n] for w, n in zip((first, second, third), numbers, strict=True)]).float()
    wide = x.view(rows, inputs).float()
    parts = [wide[:, i : i + length] @ weights[:, i : i + length].T for i in range(0, inputs, length)]
    if BIAS:
        biases = zip((first_bias, second_bias, third_bias), numbers, strict=True)
        parts[0] += torch.cat([b[:n] for b, n in biases]).float()
    sums = torch.stack(parts).unflatten(0, (-1, PARTS)).sum(1)
    if GATED:
        gate, up = sums.chunk(2, -1)
        sums = torch.nn.functional.silu(gate) * up
    out.view(sums.shape).copy_(sums)


def _add(sums, residual, out, count, RESIDUAL, **sizes):
    total = sums.sum(0)
    out.view(total.shape).copy_(total + residual.float().view(total.shape) if RESIDUAL else total)


def _add_norm(sums, residual, gain, out, normed, width, eps, **sizes):
    _add(sums, residual, out, out.numel(), RESIDUAL=True)
    _rms_norm(out, gain, normed, width, eps)


def _rotate_and_store(
    sums, cos, sin, query_gain, key_gain, out, cache, pages, table, tokens, *layout,
    HEADS, KV_HEADS, DIM, NORM, **sizes,
):  # fmt: skip
    query, key, value = sums.sum(0).split([HEADS * DIM, KV_HEADS * DIM, KV_HEADS * DIM], -1)
    eps, (slot, _, _, place, _, _) = layout[-1], table
    cos, sin = (x.float().view(tokens, 1, DIM) for x in (cos, sin))

    def rotated(x, heads, gain):
        x = x.reshape(tokens, heads, DIM)
        if NORM:
            x = (x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * gain.float()).to(out.dtype).float()
        half = torch.cat([-x[..., DIM // 2 :], x[..., : DIM // 2]], -1)
        return x * cos + half * sin

    out.view(tokens, HEADS, DIM).copy_(rotated(query, HEADS, query_gain))
    page = cache.shape[3]
    number = pages[slot, place // page].long()
    cache[number, 0, :, place % page] = rotated(key, KV_HEADS, key_gain).to(cache.dtype)
    cache[number, 1, :, place % page] = value.reshape(tokens, KV_HEADS, DIM).to(cache.dtype)


def _attend(
    query, cache, out, partial, pages, table, tokens, page_step, half_step, head_step, parts, page, scale,
    softcap,
    HEADS, KV_HEADS, DIM, FOLDED, WINDOW, **sizes,
):  # fmt: skip
    slot, local, _, _, trunk, ancestors = (x[:, None] for x in table)
    place = torch.arange(parts * page)[None]
    beyond = (place - trunk).clamp(0, 63)
    seen = (place < trunk) | ((place - trunk >= 0) & (place - trunk < 64) & ((ancestors >> beyond) & 1 != 0))
    if WINDOW:
        seen &= (place > local - WINDOW) | (place >= trunk)
    lines = cache[pages[slot[:, 0]].long()].permute(2, 0, 3, 1, 4, 5).flatten(3, 4).float()
    keys, values = (x.repeat_interleave(HEADS // KV_HEADS, 1) for x in lines)  # [N, H, places, d]
    scores = (keys @ query.view(tokens, HEADS, DIM, 1).float())[..., 0] * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen[:, None], float("-inf"))
    highest = scores.amax(-1, keepdim=True)
    weights = torch.exp(scores - highest.clamp(min=-1e30))
    total, sums = weights.sum(-1, keepdim=True), (weights[:, :, None] @ values)[:, :, 0]
    if FOLDED:
        out.view(tokens, HEADS, DIM).copy_(sums / total.clamp(min=1e-30))
        return
    partial.zero_()
    partial[..., DIM] = float("-inf")
    partial[0] = torch.cat([sums, highest, total], -1)


def _combine(partial, out, lines, DIM, **sizes):
    parts = partial.view(partial.shape[0], lines, DIM + 2)
    highest = parts[..., DIM]
    weight = torch.exp(highest - highest.amax(0).clamp(min=-1e30))
    total = (parts[..., DIM + 1] * weight).sum(0).clamp(min=1e-30)
    out.view(lines, DIM).copy_((parts[..., :DIM] * weight[..., None]).sum(0) / total[:, None])


def _weigh_blocks(logits, numbers, blocks, vocab, **sizes):
    blocks.zero_()


def _sample(logits, temperature, uniform, vocab):
    greedy = temperature == 0
    wide = logits.float()
    shifted = (wide - wide.amax(-1, keepdim=True)) / torch.where(greedy, 1.0, temperature)[:, None]
    ends = shifted.exp().double().cumsum(-1)
    drawn = torch.searchsorted(ends, uniform[:, None] * ends[:, -1:], right=True).clamp(max=vocab - 1)
    best = wide.argmax(-1, keepdim=True)
    chosen = torch.where(greedy[:, None] | (shifted.gather(1, drawn).exp() == 0), best, drawn)
    found = shifted.gather(1, chosen)[:, 0] - ends[:, -1].log().float()
    return chosen[:, 0], torch.where(wide.isfinite().all(-1), found, torch.nan)


def _draw(logits, numbers, blocks, tokens, logprobs, vocab, rows, **sizes):
    chosen, found = _sample(logits, numbers[0].float(), numbers[1], vocab)
    tokens.copy_(chosen)
    logprobs.copy_(found)


def _follow(logits, numbers, blocks, drafted, found, vocab, rows, sequences, width, **sizes):
    sizes_of_parts = [rows, sequences * (width + 1), sequences, sequences, sequences * width]
    temperatures, uniforms, first, nodes, parents = numbers.split(sizes_of_parts)
    uniforms, parents = uniforms.view(sequences, -1), parents.view(sequences, -1)
    sizes_of_parts = [1, width, width + 1, width + 1, width]
    lengths, path, tokens, logprobs, copied = found.split(sizes_of_parts, dim=1)
    copied.copy_(drafted)
    for s in range(sequences):
        node, depth = -1, 0
        while True:
            row = int(first[s]) + 1 + node
            token, logprob = _sample(
                logits[row : row + 1],
                temperatures[row : row + 1].float(),
                uniforms[s, depth : depth + 1],
                vocab,
            )
            tokens[s, depth], logprobs[s, depth] = token[0], logprob[0]
            agreeing = [
                i for i in range(int(nodes[s])) if parents[s, i] == node and drafted[s, i] == token[0]
            ]
            if not agreeing:
                break
            node = path[s, depth] = agreeing[0]
            depth += 1
        lengths[s] = depth
