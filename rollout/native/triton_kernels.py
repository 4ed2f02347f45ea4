"""Decode kernels on a GPU, written in Triton, with the interface of the CPU's native kernels."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

from paceline.rollout.native import triton_programs as programs
from paceline.rollout.native.decoder_layer import AttentionRule
from paceline.rollout.native.device_tokens import DeviceTokens, PagedLines
from paceline.rollout.native.kernels import RaggedTokens
from paceline.rollout.native.transfer import upload

_MOST_PARTS = 16  # parts that the keys of one query are split into
_PROGRAMS = 264  # programs that keep a large GPU busy: two for each multiprocessor of an H100
_KEYS = 32  # keys that attention reads at a time
_DRAWN_BLOCK = 4096  # logits that sampling reads at a time


def _device_of(x: torch.Tensor) -> AbstractContextManager[None]:
    """Makes a tensor's device the current one: Triton launches there, wherever the tensors are."""
    return torch.cuda.device(x.device) if x.device.type == "cuda" else nullcontext()


class TritonKernels:
    """Launches the kernels of one dtype on CUDA tensors of that dtype.

    Nothing in them waits for the GPU, and all shapes follow from those of the arguments, so they can be
    captured in CUDA graphs.
    """

    # whether the outputs of joined projections come side by side in one tensor
    reads_joined = False
    # whether keys and values may lie in pages
    paged = True

    @staticmethod
    def cached(cache: Any, layer: int) -> PagedLines:
        """Returns a layer's keys and values in the form that these kernels read."""
        return cache.pages(layer)

    @staticmethod
    def describe(tokens: RaggedTokens, device: torch.device) -> DeviceTokens:
        """Returns the description of a forward's tokens that these kernels read."""
        return DeviceTokens.of(tokens, device)

    @staticmethod
    def describe_seats(seats: torch.Tensor, shift: Sequence[int] | None = None) -> DeviceTokens:
        """Returns the description of E tokens of each of the first B slots, see `RaggedTokens.from_seats`."""
        moved = shift is not None and any(shift)
        return DeviceTokens.from_seats(seats, upload(list(shift or ()), seats.device) if moved else None)

    @staticmethod
    def serve(head_dim: int, *widths: int) -> bool:
        """Returns whether the head size is supported; widths are not restricted."""
        return 16 <= head_dim <= 256

    def rms_norm(self, x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
        """Normalizes ``x`` [..., width] by its root mean square and multiplies by ``gain`` [width]."""
        x = x.contiguous()
        out, width = torch.empty_like(x), x.shape[-1]
        block = triton.next_power_of_2(width)
        warps = min(max(block // 512, 1), 16)
        with _device_of(x):
            programs.rms_norm[(x.numel() // width,)](x, gain, out, width, eps, BLOCK=block, num_warps=warps)
        return out

    def silu_gate(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """Maps gate and up, each [..., width], to silu(gate) · up."""
        gate, up = (x.contiguous() for x in parts)
        out, block = torch.empty_like(gate), 1024
        with _device_of(gate):
            programs.silu_gate[(triton.cdiv(gate.numel(), block),)](gate, up, out, gate.numel(), BLOCK=block)
        return out

    def rotate_and_store(
        self,
        parts: Sequence[torch.Tensor],
        rotary: tuple[torch.Tensor, torch.Tensor],
        gains: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
        tokens: DeviceTokens,
        cache: PagedLines,
    ) -> torch.Tensor:
        """Normalizes and rotates the heads of queries and keys; writes keys and values to their places.

        Args:
            parts: Queries [1, N, H · d], keys and values [1, N, KV · d].
            rotary: cos and sin, [1, N, d] each.
            gains: Gains [d] of the query and key norms, or None if there are none.
            eps: Epsilon of those norms.
            tokens: Description of the N tokens.
            cache: Keys and values of the layer.

        Returns:
            Queries [1, N, H, d].
        """
        query, key, value = (x.contiguous() for x in parts)
        cos, sin = (x.contiguous() for x in rotary)
        _, _, kv_heads, _, dim = cache.lines.shape
        heads, count = query.shape[-1] // dim, query.shape[1]
        out = query.new_empty((1, count, heads, dim))
        query_gain, key_gain = (out, out) if gains is None else gains
        with _device_of(query):
            programs.rotate_and_store[(count, heads + 2 * kv_heads)](
                query, key, value, cos, sin, query_gain, key_gain, out, cache.lines, cache.table,
                tokens.table, count, *_layout(cache), eps,
                HEADS=heads, KV_HEADS=kv_heads, DIM=dim, BLOCK=triton.next_power_of_2(dim),
                NORM=gains is not None, num_warps=1,
            )  # fmt: skip
        return out

    def attend(
        self, query: torch.Tensor, cache: PagedLines, tokens: DeviceTokens, rule: AttentionRule
    ) -> torch.Tensor:
        """Computes the attention of each query to the keys of its slot that its description lets it see.

        Args:
            query: Queries [1, N, H, d].
            cache: Keys and values of the layer.
            tokens: Description of the N tokens.
            rule: Scale, soft cap and window.

        Returns:
            [1, N, H · d].
        """
        _, count, heads, dim = query.shape
        kv_heads = cache.lines.shape[2]
        parts = triton.next_power_of_2(min(max(_PROGRAMS // (count * kv_heads), 1), _MOST_PARTS))
        out = query.new_empty((1, count, heads * dim))
        partial = out if parts == 1 else out.new_empty((parts, count, heads, dim + 2), dtype=torch.float32)
        block = triton.next_power_of_2(dim)
        with _device_of(query):
            programs.attend[(count, kv_heads, parts)](
                query, cache.lines, out, partial, cache.table, tokens.table, count, *_layout(cache),
                rule.scale, rule.softcap,
                HEADS=heads, KV_HEADS=kv_heads, DIM=dim, BLOCK_D=block,
                ROWS=max(triton.next_power_of_2(heads // kv_heads), 16), KEYS=_KEYS, SPLITS=parts,
                WINDOW=rule.window, SOFTCAP=rule.softcap > 0,
            )  # fmt: skip
            if parts > 1:
                programs.combine[(count * heads,)](
                    partial, out, count * heads, DIM=dim, BLOCK_D=block, SPLITS=parts, num_warps=2
                )
        return out

    def draw(
        self, logits: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples one token per row from softmax(logits / temperature).

        At temperature 0 it takes the first of the largest logits.

        Args:
            logits: Logits [R, V].
            temperatures: Temperatures, float32 [R] on the CPU.
            uniforms: Uniform numbers in [0, 1), float64 [R] on the CPU.

        Returns:
            Tokens int64 [R] and log-probs float32 [R] (at temperature 1 where the temperature is 0); NaN for
            a row that has a NaN or infinite logit.
        """
        logits = logits.contiguous()
        rows, vocab = logits.shape
        numbers = upload(torch.stack([temperatures.double(), uniforms]), logits.device)
        tokens = torch.empty(rows, dtype=torch.long, device=logits.device)
        logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
        sizes = {"BLOCK": min(triton.next_power_of_2(vocab), _DRAWN_BLOCK)}
        count = triton.cdiv(vocab, sizes["BLOCK"])
        sizes["COUNT"] = triton.next_power_of_2(count)
        blocks = torch.empty(rows, 4, sizes["COUNT"], dtype=torch.float32, device=logits.device)
        with _device_of(logits):
            programs.weigh_blocks[(rows, count)](logits, numbers, blocks, vocab, rows, **sizes)
            programs.draw[(rows,)](logits, numbers, blocks, tokens, logprobs, vocab, rows, **sizes)
        return tokens, logprobs


def _layout(cache: PagedLines) -> tuple[int, ...]:
    """Returns the steps between pages, between keys and values and between heads, and the table's sizes."""
    return *cache.lines.stride()[:3], cache.table.shape[1], cache.lines.shape[3]
