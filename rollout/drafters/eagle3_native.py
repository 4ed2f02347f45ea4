"""The EAGLE-3 layer for drafting on native kernels: without padding.

On a CPU, steps of few tokens are a single call; on a GPU they replay captured graphs.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig

from paceline.rollout.drafters.base import TapReader
from paceline.rollout.drafters.draft_network import MASK, Reading
from paceline.rollout.drafters.draft_rows import DraftRows
from paceline.rollout.drafters.eagle3_model import Eagle3Model, attention_shape
from paceline.rollout.graphs.graph_plan import ModelShape, plan_graphs, plan_keys, token_buckets
from paceline.rollout.graphs.graph_pool import Capturer, Forward, GraphPool
from paceline.rollout.model.fused_layer import RootMeanSquareNorm
from paceline.rollout.model.kv_cache import SlotCache
from paceline.rollout.model.packed_linear import JoinedLinear, PackedLinear, can_pack, project, project_gate
from paceline.rollout.model.paged_cache import PagedCache
from paceline.rollout.native import (
    AnyKernels,
    AttentionRule,
    DeviceTokens,
    DraftLayer,
    Int8Rows,
    Kernels,
    RaggedTokens,
    upload,
)
from paceline.rollout.native.build import instruction_set

# up to this many tokens, one call with 8-bit weights is fastest, with matrix units (AMX) and without
_FEW_TOKENS_AMX, _FEW_TOKENS = 16, 24


class NativeNetwork:
    """Runs `Eagle3Model.step` on native kernels.

    Where weights are packed (bfloat16), steps of few tokens run in one call with 8-bit weights: half the
    bytes to read, and no Python between the parts of the layer. Longer steps run part by part.

    Args:
        weights: Model whose weights `refresh` packs and rounds.
        embed_tokens: The target's input embedding.
        cache: Draft cache of one layer.
        kernels: Kernels for the cache's dtype.
        positions: Number of positions for which rotary embeddings are kept.
    """

    def __init__(
        self,
        weights: Eagle3Model,
        embed_tokens: nn.Module,
        cache: SlotCache | PagedCache,
        kernels: AnyKernels,
        positions: int,
    ) -> None:
        self._weights, self._embed, self._cache, self._kernels = weights, embed_tokens, cache, kernels
        self._dtype = cache.shape.dtype
        packs = can_pack(cache.device, self._dtype)
        join: Callable[..., PackedLinear | JoinedLinear] = (
            PackedLinear if packs else functools.partial(JoinedLinear, kernels=kernels)
        )
        layer, attention = weights.midlayer, weights.midlayer.self_attn
        self._fc, self._head = join(weights.fc), join(weights.lm_head)
        self._qkv = join(attention.q_proj, attention.k_proj, attention.v_proj)
        self._o, self._down = join(attention.o_proj), join(layer.mlp.down_proj)
        self._gate_up = join(layer.mlp.gate_proj, layer.mlp.up_proj)
        norms = (layer.input_layernorm, layer.hidden_norm, layer.post_attention_layernorm, weights.norm)
        self._norms = tuple(RootMeanSquareNorm(norm, self._dtype, kernels) for norm in norms)
        device = cache.device
        cos, sin = weights.rotary_at(
            torch.zeros(1, dtype=self._dtype, device=device), torch.arange(positions, device=device)[None]
        )
        self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()
        self._rule = AttentionRule(cache.shape.head_dim**-0.5)
        linears = [m for m in weights.modules() if isinstance(m, nn.Linear)]
        self._few_tokens = _FEW_TOKENS_AMX if packs and instruction_set() == "amx" else _FEW_TOKENS
        self._use_int8 = (
            packs
            and Int8Rows.serves(*((m.out_features, m.in_features) for m in linears))
            and _is_plain(embed_tokens)
        )
        # what masks read in place of projected features; captured graphs read it in place
        self._mask: torch.Tensor | None = None
        if weights.mask_token is not None:
            self._mask = torch.zeros(weights.lm_head.in_features, dtype=self._dtype, device=device)
        self._table: torch.Tensor = next(embed_tokens.parameters())
        self._layer: DraftLayer | None = None
        self.graphs: GraphPool | None = None
        self._reads: GraphPool | None = None

    def capture_graphs(self, capturer: Capturer, precapture: bool) -> None:
        """Makes steps of up to four tokens for each slot run through captured graphs, see `Network`."""
        self.graphs = self._pool(self._step_described, capturer, 4 * self._cache.shape.slots)
        if precapture:
            self.graphs.capture_planned()

    def capture_reads(self, capturer: Capturer, taps: TapReader) -> None:
        """Makes reading run through captured graphs, from the taps on, see `read_rows`.

        Args:
            capturer: Capturer to use.
            taps: Reads the target's hidden states, from memory that stays in place.
        """

        def read(
            tokens: torch.Tensor, table: torch.Tensor, carried: torch.Tensor | None, span: int
        ) -> tuple[torch.Tensor, torch.Tensor]:
            described = DeviceTokens(table[:, 0])
            ids, states = self._inputs(tokens[0], taps, described)
            hidden, logits = self._run(ids, states, described, None)
            return logits[None], hidden[None]

        self._reads = self._pool(read, capturer, read_rows(self._cache.shape.slots, self._mask is not None))
        self._reads.capture_planned()

    def _pool(self, forward: Forward, capturer: Capturer, most: int) -> GraphPool:
        """Returns a pool of graphs of forwards without padding, of up to ``most`` tokens."""
        config, cache = self._weights.config, self._cache
        assert isinstance(cache, PagedCache)
        rows = token_buckets(most)
        assert config.hidden_size is not None
        pool = GraphPool(
            forward,
            plan_graphs(
                draft_shape(config, self._dtype), plan_keys("draft", (1,), rows, (cache.span,), rows[-1])
            ),
            vocab=config.draft_vocab_size,
            carry=config.hidden_size,
            dtype=self._dtype,
            device=cache.device,
            capturer=capturer,
            padding=cache.padding,
        )
        pool.follow(self.addresses)
        return pool

    def _step_described(
        self, tokens: torch.Tensor, table: torch.Tensor, carried: torch.Tensor | None, span: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs tokens [1, N] described by a `DeviceTokens` table [6, 1, N]; graphs capture this step."""
        assert carried is not None
        hidden, logits = self._run(tokens[0], carried[0], DeviceTokens(table[:, 0]), None)
        return logits[None], hidden[None]

    def refresh(self) -> None:
        """Packs the weights again after they changed, and rounds them to 8 bits where that is used."""
        for part in (self._fc, self._head, self._qkv, self._o, self._down, self._gate_up, *self._norms):
            part.refresh()
        if self._mask is not None:
            self._mask.copy_(self._weights.fc(self._weights.mask_hidden)[0])
        if not self._use_int8:
            return
        layer, attention = self._weights.midlayer, self._weights.midlayer.self_attn
        self._layer = DraftLayer(
            qkv=Int8Rows(
                torch.cat([attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight])
            ),
            o=Int8Rows(attention.o_proj.weight),
            gate_up=Int8Rows(torch.cat([layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight])),
            down=Int8Rows(layer.mlp.down_proj.weight),
            head=Int8Rows(self._weights.lm_head.weight),
            embeddings=self._table.detach().to(self._dtype),
            gains=tuple(norm.gain for norm in self._norms),
            cosines=self._cos,
            sines=self._sin,
            eps=self._norms[0].eps,
            scale=self._rule.scale,
        )
        self._address = self._layer.address()
        self._int8_fc = Int8Rows(self._weights.fc.weight)

    def read(self, reading: Reading) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads committed tokens without padding, see `Network.read`."""
        lengths, device = reading.lengths, self._cache.device
        ragged = RaggedTokens(range(len(lengths)), reading.places, lengths, shift=reading.shift)
        described = self._kernels.describe(ragged, device)
        tokens = upload(list(itertools.chain.from_iterable(reading.tokens)), device)
        newest = ragged.offsets[1:, None] - 1 - reading.masks + torch.arange(1 + reading.masks)
        keep, batch = upload(newest.flatten(), device), len(lengths)
        if self._reads is not None and len(tokens) <= self._reads.rows:
            replayed = self._replayed(self._reads, tokens, None, described)
            if replayed is not None:
                out, logits = (x[keep] for x in replayed)
                return out.unflatten(0, (batch, -1)), logits.unflatten(0, (batch, -1))
        ids, states = self._inputs(tokens, reading.taps, described)
        out, logits = self._run(ids, states, described, keep)
        return out.unflatten(0, (batch, -1)), logits.unflatten(0, (batch, -1))

    def _inputs(
        self, tokens: torch.Tensor, taps: TapReader, described: RaggedTokens | DeviceTokens
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the token ids [N] and hidden states [N, hidden] of committed tokens and masks."""
        projected = self._projected(taps, described)
        if self._mask is None:
            return tokens, projected
        masked = tokens == MASK
        assert self._weights.mask_token is not None
        ids = tokens.masked_fill(masked, self._weights.mask_token)
        return ids, torch.where(masked[:, None], self._mask, projected)

    def _projected(self, taps: TapReader, described: RaggedTokens | DeviceTokens) -> torch.Tensor:
        """Returns the hidden states [N, hidden] that the network reads, from the target's features."""
        features = taps(described.token_slots, described.positions)[:, : self._weights.fc.in_features]
        if self._layer is not None and len(features) <= self._few_tokens:
            assert isinstance(self._kernels, Kernels)
            return self._kernels.multiply(features, self._int8_fc)
        return self._fc(features[None])[0]

    def step(
        self, tokens: torch.Tensor, hidden: torch.Tensor, seats: torch.Tensor, shift: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs more tokens of each sequence, see `Network.step`."""
        batch, count = tokens.shape
        described = self._kernels.describe_seats(seats, shift)
        flat, states = tokens.flatten(), hidden.flatten(0, 1)
        replayed = None if self.graphs is None else self._replayed(self.graphs, flat, states, described)
        out, logits = self._run(flat, states, described, None) if replayed is None else replayed
        # a captured step writes its outputs to the same memory each time
        out = out if replayed is None else out.clone()
        return out.view(batch, count, -1), logits.view(batch, count, -1)

    def chains(
        self,
        newest: tuple[torch.Tensor, torch.Tensor],
        places: Sequence[int],
        shift: Sequence[int],
        depth: int,
        vocabulary: torch.Tensor,
    ) -> torch.Tensor | None:
        """Drafts a chain of likeliest tokens for each sequence in a single call.

        Args:
            newest: What `read` has returned.
            places: Place of each sequence's first draft token in the draft cache.
            shift: Position in the text of place 0 of each slot.
            depth: Number of draft tokens.
            vocabulary: Target ids of the drafter's tokens, int64 [W].

        Returns:
            Target ids, int64 [B, depth]; None where steps do not run in one call with 8-bit weights.
        """
        if self._layer is None or len(places) > self._few_tokens:
            return None
        assert isinstance(self._kernels, Kernels)
        first = RaggedTokens(range(len(places)), places, [1] * len(places), shift=shift)
        outputs = newest[0][:, 0], newest[1][:, 0]
        lines: Any = self._kernels.cached(self._cache, 0)
        return self._kernels.draft_chain(self._address, vocabulary, outputs, lines, first, depth)

    def step_in_graph(
        self, tokens: torch.Tensor, hidden: torch.Tensor, seats: torch.Tensor, rows: DraftRows
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Does what `step` does within a capture: the description of the rows, too, is read on the device."""
        batch, count = tokens.shape
        described = DeviceTokens.from_seats(seats, rows.shift, rows.slots)
        out, logits = self._run(tokens.flatten(), hidden.flatten(0, 1), described, None)
        return out.view(batch, count, -1), logits.view(batch, count, -1)

    @property
    def device(self) -> torch.device:
        """The device of the network."""
        return self._cache.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of outputs and logits."""
        return self._dtype

    @property
    def hidden_size(self) -> int:
        """The width of an output."""
        return self._weights.lm_head.in_features

    @property
    def padding_slot(self) -> int:
        """The slot of a paged cache that padding is written to."""
        assert isinstance(self._cache, PagedCache)
        return self._cache.padding(self._cache.span)[0]

    @property
    def addresses(self) -> tuple[int, ...]:
        """The addresses of what captured steps read and a trainer may move: the target's embedding."""
        return embedding_address(self._embed)

    def _replayed(
        self,
        pool: GraphPool,
        tokens: torch.Tensor,
        hidden: torch.Tensor | None,
        described: RaggedTokens | DeviceTokens,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Runs tokens by a captured graph, whose outputs the next one overwrites; None where none fits."""
        assert isinstance(described, DeviceTokens)
        pool.follow(self.addresses)
        span, slots = self._cache.span, self._cache.slots
        carried = None if hidden is None else hidden[None]
        replayed = pool.run(tokens[None], described.table[:, None], span, slots, carried)
        return None if replayed is None else (replayed[1][0], replayed[0][0])

    def _run(
        self,
        tokens: torch.Tensor,
        hidden: torch.Tensor,
        ragged: RaggedTokens | DeviceTokens,
        keep: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs tokens int64 [N] with hidden states [N, hidden].

        Returns:
            Outputs and logits of all tokens, or of those in ``keep``.
        """
        lines: Any = self._kernels.cached(self._cache, 0)
        if self._layer is not None and len(tokens) <= self._few_tokens:
            assert isinstance(self._kernels, Kernels) and isinstance(ragged, RaggedTokens)
            wanted = torch.arange(len(tokens)) if keep is None else keep
            out, logits = self._kernels.draft_step(
                self._address, tokens, hidden, lines, ragged, len(self._layer.head.scales), wanted
            )
            return out if keep is None else out[keep], logits
        embedding_norm, hidden_norm, mlp_norm, head_norm = self._norms
        hidden = hidden[None]
        embedded = self._embed(tokens).to(self._dtype)[None]
        rotary = self._cos[ragged.positions], self._sin[ragged.positions]
        kernels: Any = self._kernels
        both = torch.cat([embedding_norm(embedded), hidden_norm(hidden)], dim=-1)
        projected = project(self._qkv, both, kernels)
        heads = kernels.rotate_and_store(
            projected, (rotary[0][None], rotary[1][None]), None, 0.0, ragged, lines
        )
        attended = kernels.attend(heads, lines, ragged, self._rule)
        hidden, normed = mlp_norm.after(self._o, attended, hidden)
        gated = project_gate(self._gate_up, normed, kernels)
        out = self._down(gated, hidden)
        out = out if keep is None else out[:, keep]
        return out[0], self._head(head_norm(out))[0]


def read_rows(slots: int, parallel: bool) -> int:
    """Returns the most tokens that are read in a captured graph.

    They are four for each slot, and as many again for the masks of drafts in one pass.

    Args:
        slots: Number of sequences decoded together.
        parallel: Whether the drafter drafts in one pass.
    """
    return (8 if parallel else 4) * slots


def draft_shape(config: LlamaConfig, dtype: torch.dtype) -> ModelShape:
    """Returns the sizes of a drafter's network, for planning its graphs."""
    heads, kv_heads, dim = attention_shape(config)
    assert config.intermediate_size is not None and config.hidden_size is not None
    return ModelShape(
        layers=1,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=dim,
        vocab=config.draft_vocab_size,
        bytes_per_value=dtype.itemsize,
    )


def embedding_address(embed_tokens: nn.Module) -> tuple[int, ...]:
    """Returns the addresses of the target's embedding, which graphs of draft steps read, too."""
    return tuple(p.data_ptr() for p in embed_tokens.parameters())


def _is_plain(embed_tokens: nn.Module) -> bool:
    """Whether the embedding is a lookup table and nothing else (Gemma scales its embeddings)."""
    return type(embed_tokens) is nn.Embedding
