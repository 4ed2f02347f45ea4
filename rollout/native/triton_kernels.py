"""Decode kernels on a GPU, written in Triton, with the interface of the CPU's native kernels."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
import triton

from paceline.rollout.native import draw_programs, gpu_tiles, product_programs
from paceline.rollout.native import triton_programs as programs
from paceline.rollout.native.decoder_layer import AttentionRule
from paceline.rollout.native.device_tokens import DeviceTokens, PagedLines
from paceline.rollout.native.gpu_tiles import Tiles, attention_sums, product_tiles
from paceline.rollout.native.kernels import DrawNumbers, FollowedDrafts, RaggedTokens
from paceline.rollout.native.transfer import upload

_KEYS = 32  # keys that attention reads at a time
_CACHE_LINE = 128  # bytes
_MOST_EARLY = 64  # tokens of forwards whose programs are placed early
_DRAWN_BLOCK = 4096  # logits that sampling reads at a time

Layers = Sequence[tuple[torch.Tensor, torch.Tensor | None]]


@dataclass(frozen=True, slots=True)
class Sums:
    """Holds the outputs of layers of one input side by side, in parts that the next kernel adds.

    Attributes:
        parts: Sums over parts of the inputs, float32 [parts, N, sum of out].
        dtype: Dtype of the layers.
    """

    parts: torch.Tensor
    dtype: torch.dtype


def _device_of(x: torch.Tensor) -> AbstractContextManager[None]:
    """Makes a tensor's device the current one: Triton launches there, wherever the tensors are."""
    current = x.device.type != "cuda" or x.device.index == torch.cuda.current_device()
    return nullcontext() if current else torch.cuda.device(x.device)


def _early(x: torch.Tensor, tokens: int) -> Mapping[str, bool]:
    """Returns the options that place a layer's programs on the GPU early, see `wait_for_inputs`.

    Args:
        x: Tensor of the GPU.
        tokens: Number of tokens of the forward. Of many, it makes no forward faster.
    """
    if tokens <= _MOST_EARLY and x.device.type == "cuda" and _is_hopper(x.device):
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@functools.cache
def _is_hopper(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (9, 0)


class TritonKernels:
    """Launches the kernels of one dtype on CUDA tensors of that dtype.

    Nothing in them waits for the GPU, and all shapes follow from those of the arguments, so they can be
    captured in CUDA graphs.
    """

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
        rows, (block, warps) = x.numel() // width, _row_block(width)
        with _device_of(x):
            programs.rms_norm[(rows,)](
                x, gain, out, width, eps, BLOCK=block, num_warps=warps, **_early(x, rows)
            )
        return out

    def multiply(self, x: torch.Tensor, layers: Layers) -> Sums:
        """Applies up to three layers to ``x`` [1, N, in]; no row of the result depends on another.

        Args:
            x: Input in the layers' dtype.
            layers: Weights [out, in] and biases [out], either all with a bias or all without.
        """
        tiles, outputs = self._tiles(x, layers), sum(len(weight) for weight, _ in layers)
        out = x.new_empty((tiles.written, x.shape[-2], outputs), dtype=torch.float32)
        self._launch(x, layers, tiles, out)
        return Sums(out, x.dtype)

    def gate(self, x: torch.Tensor, layers: Layers) -> torch.Tensor:
        """Applies a gate and an up projection to ``x`` [1, N, in]; returns silu(gate) · up, [1, N, out]."""
        tiles = self._tiles(x, layers)
        out = x.new_empty((1, x.shape[-2], len(layers[0][0])))
        # silu needs whole sums
        self._launch(x, layers, replace(tiles, folded=True), out, gated=True)
        return out

    def linear(self, x: torch.Tensor, layers: Layers, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Applies layers to ``x`` [1, N, in]; returns [1, N, sum of out], plus ``residual`` if given."""
        tiles = self._tiles(x, layers)
        if residual is not None or tiles.written > 1:
            return self.add(self.multiply(x, layers), residual)
        out = x.new_empty((*x.shape[:-1], sum(len(weight) for weight, _ in layers)))
        self._launch(x, layers, tiles, out)
        return out

    @staticmethod
    def _tiles(x: torch.Tensor, layers: Layers) -> Tiles:
        outputs, (_, inputs) = sum(len(weight) for weight, _ in layers), layers[0][0].shape
        return product_tiles(outputs, inputs, x.numel() // inputs, x.dtype.itemsize)

    @staticmethod
    def _launch(
        x: torch.Tensor, layers: Layers, tiles: Tiles, out: torch.Tensor, gated: bool = False
    ) -> None:
        """Launches a product into ``out`` [written, N, outputs]."""
        x, inputs = x.contiguous(), x.shape[-1]
        weights = [weight.contiguous() for weight, _ in layers]
        biases = [bias for _, bias in layers if bias is not None]
        sizes = [*map(len, weights), 0, 0][:2]
        fill = 3 - len(layers)
        rows, outputs = x.numel() // inputs, out.shape[-1]
        block, line = tiles.outputs // 2 if gated else tiles.outputs, _CACHE_LINE // x.element_size()
        ahead = tiles.stages * tiles.step // line  # lines of a row that fill the pipeline
        grid = triton.cdiv(rows, tiles.tokens), triton.cdiv(outputs, block), tiles.written
        with _device_of(x):
            product_programs.multiply[grid](
                x, *weights, *weights[:1] * fill, *(biases or weights), *(biases or weights)[:1] * fill, out,
                rows, *sizes, outputs, inputs, tiles.length,
                TOKENS=tiles.tokens, OUTPUTS=tiles.outputs, STEP=tiles.step,
                PARTS=tiles.parts // tiles.written, GATED=gated, BIAS=bool(biases),
                RAGGED=inputs % tiles.step != 0, LINE=line, AHEAD=triton.next_power_of_2(max(ahead, 1)),
                num_warps=tiles.warps, num_stages=tiles.stages, **_early(x, rows),
            )  # fmt: skip

    def add(self, sums: Sums, residual: torch.Tensor | None = None) -> torch.Tensor:
        """Adds the parts of sums and ``residual`` [1, N, out]; returns [1, N, out]."""
        parts, count, outputs = sums.parts.shape
        out, block = sums.parts.new_empty((1, count, outputs), dtype=sums.dtype), 1024
        other = out if residual is None else residual.contiguous()
        with _device_of(out):
            product_programs.add[(triton.cdiv(out.numel(), block),)](
                sums.parts, other, out, out.numel(), PARTS=parts, RESIDUAL=residual is not None, BLOCK=block,
                **_early(out, count),
            )  # fmt: skip
        return out

    def add_norm(
        self, sums: Sums, residual: torch.Tensor, gain: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Adds as `add` does; returns the result and its norm as by `rms_norm`, [1, N, out] each."""
        (parts, count, width), residual = sums.parts.shape, residual.contiguous()
        out, normed = torch.empty_like(residual), torch.empty_like(residual)
        block, warps = _row_block(width)
        with _device_of(out):
            product_programs.add_norm[(count,)](
                sums.parts, residual, gain, out, normed, width, eps,
                PARTS=parts, BLOCK=block, num_warps=warps, **_early(out, count),
            )  # fmt: skip
        return out, normed

    def rotate_and_store(
        self,
        sums: Sums,
        rotary: tuple[torch.Tensor, torch.Tensor],
        gains: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
        tokens: DeviceTokens,
        cache: PagedLines,
    ) -> torch.Tensor:
        """Normalizes and rotates the heads of queries and keys; writes keys and values to their places.

        Args:
            sums: Queries, keys and values side by side, of N tokens and (H + 2 KV) · d outputs.
            rotary: cos and sin, [1, N, d] each.
            gains: Gains [d] of the query and key norms, or None if there are none.
            eps: Epsilon of those norms.
            tokens: Description of the N tokens.
            cache: Keys and values of the layer.

        Returns:
            Queries [1, N, H, d].
        """
        cos, sin = (x.contiguous() for x in rotary)
        _, _, kv_heads, _, dim = cache.lines.shape
        parts, count, outputs = sums.parts.shape
        heads = outputs // dim - 2 * kv_heads
        out = cos.new_empty((1, count, heads, dim), dtype=sums.dtype)
        query_gain, key_gain = (out, out) if gains is None else gains
        with _device_of(out):
            programs.rotate_and_store[(count, heads + 2 * kv_heads)](
                sums.parts, cos, sin, query_gain, key_gain, out, cache.lines, cache.table,
                tokens.table, count, *_layout(cache), eps,
                HEADS=heads, KV_HEADS=kv_heads, DIM=dim, BLOCK=triton.next_power_of_2(dim),
                NORM=gains is not None, PARTS=parts, num_warps=1, **_early(out, count),
            )  # fmt: skip
        return out

    def attend(
        self, query: torch.Tensor, cache: PagedLines, tokens: DeviceTokens, rule: AttentionRule
    ) -> torch.Tensor:
        """Computes the attention of each query to the keys of its slot that its description lets it see.

        A token that sees nothing but a trunk gets the same sums in every forward. A tree's node does not: its
        ancestors' keys lie elsewhere than in a text, and are added last.

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
        parts, written = gpu_tiles.ATTENTION_PARTS, attention_sums(count, kv_heads)
        folded = written == 1
        out = query.new_empty((1, count, heads * dim))
        partial = out if folded else out.new_empty((written, count, heads, dim + 2), dtype=torch.float32)
        block = triton.next_power_of_2(dim)
        with _device_of(query):
            programs.attend[(count, kv_heads, written)](
                query, cache.lines, out, partial, cache.table, tokens.table, count, *_layout(cache),
                rule.scale, rule.softcap,
                HEADS=heads, KV_HEADS=kv_heads, DIM=dim, BLOCK_D=block,
                ROWS=max(triton.next_power_of_2(heads // kv_heads), 16), KEYS=_KEYS, SPLITS=parts,
                FOLDED=folded, WINDOW=rule.window, SOFTCAP=rule.softcap > 0, **_early(out, count),
            )  # fmt: skip
            if not folded:
                programs.combine[(count * heads,)](
                    partial, out, count * heads, DIM=dim, BLOCK_D=block, SPLITS=parts, num_warps=1,
                    **_early(out, count),
                )  # fmt: skip
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
        logits, (rows, vocab) = logits.contiguous(), logits.shape
        numbers = upload(torch.stack([temperatures.double(), uniforms]), logits.device)
        tokens = torch.empty(rows, dtype=torch.long, device=logits.device)
        logprobs = torch.empty(rows, dtype=torch.float32, device=logits.device)
        blocks, sizes = self._weigh(logits, numbers)
        with _device_of(logits):
            draw_programs.draw[(rows,)](logits, numbers, blocks, tokens, logprobs, vocab, rows, **sizes)
        return tokens, logprobs

    def follow(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        nodes: torch.Tensor,
        tree: tuple[torch.Tensor, torch.Tensor],
        draw: DrawNumbers,
    ) -> FollowedDrafts:
        """Descends draft trees along sampled tokens, see `Kernels.follow`.

        Logits and the tree's tokens lie on the GPU, everything else on the CPU. What lies behind a sequence's
        path or its last node in the results is undefined.
        """
        logits, tokens, (temperatures, uniforms) = logits.contiguous(), tree[0].contiguous(), draw
        count, width = tokens.shape
        # numpy's operations take less time than torch's, and the GPU waits for them
        of_rows = np.repeat(temperatures.numpy(), nodes.numpy() + 1)
        parts = [of_rows, *(x.numpy().ravel() for x in (uniforms, rows, nodes, tree[1]))]
        numbers = upload(np.concatenate(parts, dtype=np.float64), logits.device)
        found = torch.empty(count, 4 * width + 3, dtype=torch.float64, device=logits.device)
        blocks, sizes = self._weigh(logits, numbers)
        with _device_of(logits):
            draw_programs.follow[(count,)](
                logits, numbers, blocks, tokens, found, logits.shape[1], len(of_rows), count, width,
                NODES=triton.next_power_of_2(max(width, 1)), **sizes,
            )  # fmt: skip
        ends = np.cumsum([1, width, width + 1, width + 1])
        lengths, path, sampled, logprobs, drafted = np.split(found.cpu().numpy(), ends, axis=1)
        with np.errstate(invalid="ignore"):  # what is undefined need not be a number
            lengths, path, sampled, drafted = (x.astype(np.int64) for x in (lengths, path, sampled, drafted))
        return FollowedDrafts(lengths[:, 0], path, sampled, logprobs, drafted)

    @staticmethod
    def _weigh(logits: torch.Tensor, numbers: torch.Tensor) -> tuple[torch.Tensor, dict[str, int]]:
        """Sums the weights of each block of each row; returns them and the sizes of the programs to come."""
        rows, vocab = logits.shape
        block = min(triton.next_power_of_2(vocab), _DRAWN_BLOCK)
        count = triton.cdiv(vocab, block)
        sizes = {"BLOCK": block, "COUNT": triton.next_power_of_2(count)}
        blocks = torch.empty(rows, 4, sizes["COUNT"], dtype=torch.float32, device=logits.device)
        with _device_of(logits):
            draw_programs.weigh_blocks[(rows, count)](logits, numbers, blocks, vocab, **sizes)
        return blocks, sizes


def _row_block(width: int) -> tuple[int, int]:
    """Returns the block that holds a row of ``width`` values, and the warps to read it with."""
    block = triton.next_power_of_2(width)
    return block, min(max(block // 512, 1), 16)


def _layout(cache: PagedLines) -> tuple[int, ...]:
    """Returns the steps between pages, between keys and values and between heads, and the table's sizes."""
    return *cache.lines.stride()[:3], cache.table.shape[1], cache.lines.shape[3]
