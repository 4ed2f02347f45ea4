"""Python bindings of the native kernels, which take torch tensors."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from paceline.rollout.native.decoder_layer import AttentionRule, NativeLayer

_LANES = 16  # floats per vector, kLanes in lanes.h
_HEAD_DIMS = (16, 32, 64, 80, 96, 128, 256)  # those that attend_any in attention.h is instantiated for

DrawNumbers = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, slots=True)
class FollowedDrafts:
    """Holds what was accepted of the drafts of S sequences of up to N nodes, in arrays on the host.

    Attributes:
        lengths: Number of accepted nodes, int64 [S].
        path: Accepted nodes, int64 [S, N].
        tokens: Tokens sampled along the path, one more than accepted, int64 [S, N + 1].
        logprobs: Their log-probs as from `Kernels.draw`, float32 or float64 [S, N + 1].
        drafted: Tokens of the draft, int64 [S, N].
    """

    lengths: np.ndarray
    path: np.ndarray
    tokens: np.ndarray
    logprobs: np.ndarray
    drafted: np.ndarray


_pointer, _int, _float = ctypes.c_void_p, ctypes.c_int64, ctypes.c_float


class _Layout(ctypes.Structure):
    """Mirrors `Layout` in layout.h."""

    _fields_ = [
        (name, _int) for name in ("tokens", "sequences", "heads", "kv_heads", "dim", "slots", "span")
    ] + [(name, _pointer) for name in ("token_slots", "seats", "places", "trunks", "ancestors", "offsets")]


class _Matrix(ctypes.Structure):
    """Mirrors `Quantized` in int8_product.h."""

    _fields_ = [("weights", _pointer), ("scales", _pointer), ("outputs", _int), ("inputs", _int)]


class _DraftLayer(ctypes.Structure):
    """Mirrors `DraftLayer` in drafting.h."""

    _fields_ = [
        *((name, _int) for name in ("hidden", "intermediate", "vocab")),
        *((name, _Matrix) for name in ("qkv", "o", "gate_up", "down", "head")),
        *(
            (name, _pointer)
            for name in ("embeddings", "of_embedding", "of_hidden", "of_mlp", "of_head", "cosines", "sines")
        ),
        *((name, _float) for name in ("eps", "scale")),
    ]


class Int8Rows:
    """Holds a matrix in 8 bits with one scale per row.

    It serves drafters, whose rounding errors can only cost acceptance.

    Args:
        weight: Matrix [outputs, inputs] of any float dtype; outputs must be a multiple of 4, inputs of 64.

    Attributes:
        weights: Weights divided by their row's scale, plus 128, uint8 [outputs, inputs].
        scales: Scale of each row, float32 [outputs].
    """

    def __init__(self, weight: torch.Tensor) -> None:
        weight = weight.detach().float()
        self.scales = (weight.abs().amax(1) / 127).clamp(min=1e-12)
        self.weights = ((weight / self.scales[:, None]).round() + 128).to(torch.uint8).contiguous()

    @staticmethod
    def serves(*shapes: tuple[int, int]) -> bool:
        """Returns whether matrices of these shapes (outputs, inputs) consist of whole blocks."""
        return all(outputs % 4 == 0 and inputs % 64 == 0 for outputs, inputs in shapes)

    @property
    def address(self) -> _Matrix:
        """The struct that describes the matrix to the kernels; valid while this object lives."""
        outputs, inputs = self.weights.shape
        return _Matrix(self.weights.data_ptr(), self.scales.data_ptr(), outputs, inputs)


@dataclass(frozen=True, slots=True)
class DraftLayer:
    """Holds a drafter's complete layer for `Kernels.draft_step`.

    Everything but the matrices is contiguous and in the kernels' dtype.

    Attributes:
        qkv: Projections of queries, keys and values.
        o: Output projection of the attention.
        gate_up: Gate and up projections.
        down: Down projection.
        head: Output head.
        embeddings: Token embeddings, [vocabulary of the target, hidden].
        gains: Gains [hidden] of the norms of the embedding, of the hidden state, before the MLP and before
            the head.
        cosines: Cosines of the rotary embedding, [positions, d].
        sines: Sines of the rotary embedding, [positions, d].
        eps: Epsilon of the norms.
        scale: Factor on the attention scores.
    """

    qkv: Int8Rows
    o: Int8Rows
    gate_up: Int8Rows
    down: Int8Rows
    head: Int8Rows
    embeddings: torch.Tensor
    gains: tuple[torch.Tensor, ...]
    cosines: torch.Tensor
    sines: torch.Tensor
    eps: float
    scale: float

    def address(self) -> ctypes.Structure:
        """Returns the struct that describes the layer to the kernels; valid while this object lives."""
        matrices = [m.address for m in (self.qkv, self.o, self.gate_up, self.down, self.head)]
        vectors = [x.data_ptr() for x in (self.embeddings, *self.gains, self.cosines, self.sines)]
        sizes = self.o.weights.shape[0], self.down.weights.shape[1], self.head.weights.shape[0]
        return _DraftLayer(*sizes, *matrices, *vectors, self.eps, self.scale)


class RaggedTokens:
    """Describes the tokens of a forward, sequence after sequence, without padding.

    A chain's token is stored at its position in the cache and sees all tokens before it. A draft tree's nodes
    are stored side by side after the token that the tree starts from; they see that token, all tokens before
    it, and their own ancestors.

    Args:
        slots: Slot of each of the S sequences.
        starts: Place of each sequence's first token in this forward.
        counts: Number of each sequence's tokens in this forward, at least 1.
        nodes: For draft trees, three arrays int64 [N]: the number of leading places that a token sees
            completely, its depth below the last of these (0 for a token that is no node), and its ancestors
            as bits.
        shift: Position of place 0 of each sequence, if a cache holds only its last tokens; None for 0.

    Attributes:
        token_slots: Slot of each token, int64 [N].
        positions: Position of each token in its text, int64 [N].
        local_positions: Position of each token counted from place 0 of its slot, in which a window is
            measured, int64 [N].
        places: Place where each token's keys are written, int64 [N].
        trunks: Number of leading places that each token sees completely, int64 [N].
        ancestors: Bit masks, int64 [N]; bit j says that the token sees place ``trunk + j``.
        offsets: Index of each sequence's first token, int64 [S + 1].
    """

    def __init__(
        self,
        slots: Sequence[int],
        starts: Sequence[int],
        counts: Sequence[int],
        nodes: tuple[np.ndarray, ...] | None = None,
        shift: Sequence[int] | None = None,
    ) -> None:
        number = np.asarray(counts, dtype=np.int64)
        offsets = np.concatenate([[0], number.cumsum()])
        self.offsets = torch.from_numpy(offsets)
        self.token_slots = torch.from_numpy(np.repeat(np.asarray(slots, dtype=np.int64), number))
        places = np.arange(offsets[-1]) + np.repeat(np.asarray(starts, dtype=np.int64) - offsets[:-1], number)
        self.places = torch.from_numpy(places)
        if nodes is None:
            seats, trunks, ancestors = places, places + 1, np.zeros_like(places)
        else:
            trunks, depth, ancestors = nodes
            seats = trunks - 1 + depth
        positions = seats if shift is None else seats + np.repeat(np.asarray(shift, dtype=np.int64), number)
        self.local_positions = torch.from_numpy(seats)
        self.positions, self.trunks = torch.from_numpy(positions), torch.from_numpy(trunks)
        self.ancestors = torch.from_numpy(ancestors)
        self._layouts: dict[tuple[int, torch.Size], _Layout] = {}

    @classmethod
    def from_seats(cls, seats: torch.Tensor, shift: Sequence[int] | None = None) -> RaggedTokens:
        """Returns E tokens of each of the first B slots.

        Args:
            seats: Seats counted from place 0, int64 [4, B, E]; the places of a row are adjacent.
            shift: Position of place 0 of each sequence; None for 0.
        """
        position, place, trunk, ancestors = seats.numpy()
        nodes = tuple(np.ascontiguousarray(x).reshape(-1) for x in (trunk, position - trunk + 1, ancestors))
        batch, count = place.shape
        return cls(range(batch), place[:, 0], [count] * batch, nodes=nodes, shift=shift)

    @property
    def seats(self) -> torch.Tensor:
        """The position, place, trunk and ancestors of each token, int64 [4, 1, N]."""
        return torch.stack([self.positions, self.places, self.trunks, self.ancestors])[:, None]

    def layout(self, heads: int, cache: torch.Size) -> ctypes.Structure:
        """Returns the kernels' description of these tokens, built once for all layers.

        Args:
            heads: Number of query heads.
            cache: Shape of a layer's cache, [2, slots, KV, span, d].
        """
        key = heads, cache
        if key not in self._layouts:
            _, slots, kv_heads, span, dim = cache
            sizes = len(self.positions), len(self.offsets) - 1, heads, kv_heads, dim, slots, span
            arrays = (
                self.token_slots,
                self.local_positions,
                self.places,
                self.trunks,
                self.ancestors,
                self.offsets,
            )
            self._layouts[key] = _Layout(*sizes, *(x.data_ptr() for x in arrays))
        return self._layouts[key]


class Kernels:
    """Calls the kernels of one dtype on CPU tensors of that dtype.

    cos, sin, gains, positions and cache must be contiguous.
    """

    def __init__(self, library: ctypes.CDLL, dtype: torch.dtype) -> None:
        suffix = {torch.float32: "float32", torch.bfloat16: "bfloat16"}[dtype]
        self._rms_norm = getattr(library, f"paceline_rms_norm_{suffix}")
        self._rms_norm.argtypes = [_pointer, _pointer, _pointer, _int, _int, _float]
        self._silu_gate = getattr(library, f"paceline_silu_gate_{suffix}")
        self._silu_gate.argtypes = [_pointer, _pointer, _int, _int]
        self._rotate_and_store = getattr(library, f"paceline_rotate_and_store_{suffix}")
        self._rotate_and_store.argtypes = [_pointer] * 5 + [_float] + [_pointer] * 3
        self._attend = getattr(library, f"paceline_attend_{suffix}")
        self._attend.argtypes = [_pointer] * 4 + [_float, _float, _int]
        self._decoder_layer = getattr(library, f"paceline_decoder_layer_{suffix}")
        self._decoder_layer.argtypes = [_pointer] * 7
        self._draft_step = getattr(library, f"paceline_draft_step_{suffix}")
        self._draft_step.argtypes = [_pointer] * 7 + [_int] + [_pointer] * 2
        self._draft_chain = getattr(library, f"paceline_draft_chain_{suffix}")
        self._draft_chain.argtypes = [_pointer] * 7 + [_int, _pointer]
        self._multiply = getattr(library, f"paceline_multiply_{suffix}")
        self._multiply.argtypes = [_pointer, _int, _pointer, _pointer]
        self._follow = getattr(library, f"paceline_follow_{suffix}")
        self._follow.argtypes = [_pointer] + [_int] * 3 + [_pointer] * 10
        self._move_lines = getattr(library, f"paceline_move_lines_{suffix}")
        self._move_lines.argtypes = [_pointer, _int] + [_pointer] * 3 + [_int, _pointer]
        self._draw = getattr(library, f"paceline_draw_{suffix}")
        self._draw.argtypes = [_pointer, _int, _int] + [_pointer] * 4

    # whether keys and values may lie in pages
    paged = False

    @staticmethod
    def cached(cache: Any, layer: int) -> torch.Tensor:
        """Returns a layer's keys and values in the form that these kernels read."""
        return cache.lines(layer)

    @staticmethod
    def describe(tokens: RaggedTokens, device: torch.device) -> RaggedTokens:
        """Returns the description of a forward's tokens that these kernels read."""
        return tokens

    @staticmethod
    def describe_seats(seats: torch.Tensor, shift: Sequence[int] | None = None) -> RaggedTokens:
        """Returns the description of E tokens of each of the first B slots, see `RaggedTokens.from_seats`."""
        return RaggedTokens.from_seats(seats, shift)

    @staticmethod
    def serve(head_dim: int, *widths: int) -> bool:
        """Returns whether the head size and the widths are supported by the kernels' vectors."""
        return head_dim in _HEAD_DIMS and all(width % _LANES == 0 for width in widths)

    def rms_norm(self, x: torch.Tensor, gain: torch.Tensor, eps: float) -> torch.Tensor:
        """Normalizes ``x`` [..., width] by its root mean square and multiplies by ``gain`` [width]."""
        x = x.contiguous()
        out = torch.empty_like(x)
        width = x.shape[-1]
        self._rms_norm(x.data_ptr(), gain.data_ptr(), out.data_ptr(), x.numel() // width, width, eps)
        return out

    def silu_gate(self, x: torch.Tensor) -> torch.Tensor:
        """Maps gate and up side by side, [..., 2 · width], to silu(gate) · up, [..., width]."""
        x = x.contiguous()
        width = x.shape[-1] // 2
        out = x.new_empty((*x.shape[:-1], width))
        self._silu_gate(x.data_ptr(), out.data_ptr(), x.numel() // (2 * width), width)
        return out

    def rotate_and_store(
        self,
        joined: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        gains: tuple[torch.Tensor, torch.Tensor] | None,
        eps: float,
        tokens: RaggedTokens,
        cache: torch.Tensor,
    ) -> torch.Tensor:
        """Normalizes and rotates the heads of queries and keys; writes keys and values to their places.

        Args:
            joined: Queries, keys and values side by side, [1, N, (H + 2 KV) · d].
            rotary: cos and sin, [1, N, d] each.
            gains: Gains [d] of the query and key norms, or None if there are none.
            eps: Epsilon of those norms.
            tokens: Description of the N tokens.
            cache: Cache of the layer, [2, slots, KV, span, d].

        Returns:
            Queries [1, N, H, d].
        """
        joined = joined.contiguous()
        kv_heads, dim = cache.shape[2], cache.shape[4]
        heads = joined.shape[-1] // dim - 2 * kv_heads
        query = joined.new_empty((1, joined.shape[1], heads, dim))
        cos, sin = rotary
        query_gain, key_gain = (None, None) if gains is None else (gains[0].data_ptr(), gains[1].data_ptr())
        self._rotate_and_store(
            joined.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            query_gain,
            key_gain,
            eps,
            query.data_ptr(),
            cache.data_ptr(),
            ctypes.addressof(tokens.layout(heads, cache.shape)),
        )
        return query

    def attend(
        self, query: torch.Tensor, cache: torch.Tensor, tokens: RaggedTokens, rule: AttentionRule
    ) -> torch.Tensor:
        """Computes the attention of each query to the keys of its slot that its `RaggedTokens` let it see.

        Args:
            query: Queries [1, N, H, d].
            cache: Cache of the layer, [2, slots, KV, span, d].
            tokens: Description of the N tokens.
            rule: Scale, soft cap and window.

        Returns:
            [1, N, H · d].
        """
        _, count, heads, dim = query.shape
        out = query.new_empty((1, count, heads * dim))
        layout = ctypes.addressof(tokens.layout(heads, cache.shape))
        self._attend(
            query.data_ptr(), cache.data_ptr(), out.data_ptr(), layout, rule.scale, rule.softcap, rule.window
        )
        return out

    def decoder_layer(
        self,
        layer: NativeLayer,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        tokens: RaggedTokens,
        cache: torch.Tensor,
    ) -> torch.Tensor:
        """Runs a whole decoder layer over N tokens; computes the bits that its kernels give one by one.

        Args:
            layer: The layer's weights.
            hidden: Hidden states, [1, N, hidden].
            rotary: cos and sin, [1, N, d] each.
            tokens: Description of the N tokens.
            cache: Cache of the layer, [2, slots, KV, span, d]; keys and values are written to it.

        Returns:
            Hidden states [1, N, hidden].
        """
        hidden = hidden.contiguous()
        out = torch.empty_like(hidden)
        cos, sin = rotary
        self._decoder_layer(
            layer.address,
            hidden.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            cache.data_ptr(),
            ctypes.addressof(tokens.layout(layer.inner // cache.shape[4], cache.shape)),
            out.data_ptr(),
        )
        return out

    def multiply(self, x: torch.Tensor, matrix: Int8Rows) -> torch.Tensor:
        """Multiplies ``x`` [N, inputs] by the matrix; returns [N, outputs]."""
        x = x.contiguous()
        out = x.new_empty(len(x), len(matrix.scales))
        struct = matrix.address  # must outlive the call
        self._multiply(x.data_ptr(), len(x), ctypes.addressof(struct), out.data_ptr())
        return out

    def draft_step(
        self,
        layer: ctypes.Structure,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        cache: torch.Tensor,
        ragged: RaggedTokens,
        vocab: int,
        keep: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs one step of a drafter over N tokens.

        Args:
            layer: Struct from `DraftLayer.address`.
            tokens: Token ids, int64 [N].
            hidden: Hidden states, [N, hidden].
            cache: Cache of the drafter, [2, slots, KV, span, d].
            ragged: Description of the tokens.
            vocab: Vocabulary size of the drafter.
            keep: Tokens whose logits are wanted, int64 [K].

        Returns:
            Outputs of all tokens [N, hidden], and the logits of those to keep [K, vocab].
        """
        tokens, hidden, keep = tokens.contiguous(), hidden.contiguous(), keep.contiguous()
        out, logits = torch.empty_like(hidden), hidden.new_empty(len(keep), vocab)
        layout = _draft_layout(layer, cache, ragged)
        arrays = (tokens, ragged.positions, hidden, cache)
        addresses = [x.data_ptr() for x in arrays]
        kept = (keep.data_ptr(), len(keep))
        self._draft_step(
            ctypes.addressof(layer),
            *addresses,
            ctypes.addressof(layout),
            *kept,
            out.data_ptr(),
            logits.data_ptr(),
        )
        return out, logits

    def draft_chain(
        self,
        layer: ctypes.Structure,
        vocabulary: torch.Tensor,
        newest: tuple[torch.Tensor, torch.Tensor],
        cache: torch.Tensor,
        ragged: RaggedTokens,
        depth: int,
    ) -> torch.Tensor:
        """Drafts a chain of likeliest tokens for each of N sequences.

        Args:
            layer: Struct from `DraftLayer.address`.
            vocabulary: Target ids of the drafter's tokens, int64 [vocab].
            newest: Outputs [N, hidden] and logits [N, vocab] at each sequence's newest token.
            cache: Cache of the drafter, [2, slots, KV, span, d].
            ragged: Description of the first draft token of each sequence.
            depth: Number of draft tokens.

        Returns:
            Target ids, int64 [N, depth].
        """
        layout = _draft_layout(layer, cache, ragged)
        drafted = torch.empty(len(ragged.positions), depth, dtype=torch.int64)
        arrays = [x.contiguous() for x in (vocabulary, ragged.positions, *newest)]
        addresses = [x.data_ptr() for x in (*arrays, cache)]
        self._draft_chain(
            ctypes.addressof(layer), *addresses, ctypes.addressof(layout), depth, drafted.data_ptr()
        )
        return drafted

    def follow(
        self,
        logits: torch.Tensor,
        rows: torch.Tensor,
        nodes: torch.Tensor,
        tree: tuple[torch.Tensor, torch.Tensor],
        draw: DrawNumbers,
    ) -> FollowedDrafts:
        """Descends draft trees along sampled tokens; only rows on the way are sampled from.

        Args:
            logits: Logits [R, V].
            rows: First row of each sequence, int64 [S]: the one after its last committed token. The rows
                after its nodes follow.
            nodes: Number of nodes in each tree, int64 [S].
            tree: Tokens and parents of the nodes, int64 [S, N] each.
            draw: Temperatures float32 [S], and uniforms float64 [S, N + 1] by depth.
        """
        logits = logits.contiguous()
        tokens, parents = (x.contiguous() for x in tree)
        count, width = tokens.shape
        temperatures, uniforms = (x.contiguous() for x in draw)
        path, drawn = (
            torch.zeros(count, width, dtype=torch.long),
            torch.zeros(count, width + 1, dtype=torch.long),
        )
        logprobs, lengths = torch.zeros(count, width + 1), torch.zeros(count, dtype=torch.long)
        arrays = (rows, nodes, tokens, parents, temperatures, uniforms, path, drawn, logprobs, lengths)
        self._follow(logits.data_ptr(), logits.shape[1], count, width, *(x.data_ptr() for x in arrays))
        return FollowedDrafts(*(x.numpy() for x in (lengths, path, drawn, logprobs, tokens)))

    def move_lines(
        self, layers: Sequence[torch.Tensor], slots: np.ndarray, sources: np.ndarray, targets: np.ndarray
    ) -> None:
        """Moves keys and values within their slots, in every layer.

        Args:
            layers: Cache of each layer, [2, slots, KV, span, d].
            slots: Slot of each move, int64 [M].
            sources: Place that each move reads, int64 [M].
            targets: Place that each move writes, int64 [M]; within a slot in increasing order, and none after
                its source.
        """
        _, count, kv_heads, span, dim = layers[0].shape
        layout = _Layout(0, 0, kv_heads, kv_heads, dim, count, span)
        addresses = (ctypes.c_void_p * len(layers))(*(layer.data_ptr() for layer in layers))
        arrays = (np.ascontiguousarray(x, dtype=np.int64) for x in (slots, sources, targets))
        kept_alive = list(arrays)  # must outlive the call
        self._move_lines(
            addresses,
            len(layers),
            *(x.ctypes.data for x in kept_alive),
            len(kept_alive[0]),
            ctypes.addressof(layout),
        )

    def draw(
        self, logits: torch.Tensor, temperatures: torch.Tensor, uniforms: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Samples one token per row from softmax(logits / temperature) in one pass.

        At temperature 0 it takes the first of the largest logits.

        Args:
            logits: Logits [R, V].
            temperatures: Temperatures, float32 [R].
            uniforms: Uniform numbers in [0, 1), float64 [R].

        Returns:
            Tokens int64 [R] and log-probs float32 [R] (at temperature 1 where the temperature is 0); NaN for
            a row that has a NaN or infinite logit.
        """
        logits = logits.contiguous()
        rows, vocab = logits.shape
        tokens, logprobs = torch.empty(rows, dtype=torch.long), torch.empty(rows)
        arrays = (temperatures, uniforms, tokens, logprobs)
        self._draw(logits.data_ptr(), rows, vocab, *(x.data_ptr() for x in arrays))
        return tokens, logprobs


def _draft_layout(layer: ctypes.Structure, cache: torch.Tensor, ragged: RaggedTokens) -> ctypes.Structure:
    """Returns the description of a drafter's tokens, see `RaggedTokens.layout`."""
    described = ctypes.cast(ctypes.addressof(layer), ctypes.POINTER(_DraftLayer)).contents
    return ragged.layout(described.o.inputs // cache.shape[-1], cache.shape)
