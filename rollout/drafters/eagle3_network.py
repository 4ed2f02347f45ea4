"""Running the EAGLE-3 layer for drafting: padded on torch's operators, or without padding on the native kernels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import nn

from rollout.attention import ForwardBatch, grouped_attention
from rollout.drafters.eagle3_model import Eagle3Model, attention_shape
from rollout.fused_layer import RootMeanSquareNorm
from rollout.graph_plan import ModelShape, plan_graphs, plan_keys, powers_of_two
from rollout.graph_pool import Capturer, CudaCapturer, GraphPool
from rollout.kv_cache import SlotCache
from rollout.native import AttentionRule, Kernels, RaggedTokens, load_kernels
from rollout.packed_linear import JoinedLinear, PackedLinear, can_pack
from rollout.sequence import SequenceState

_EXACT_WIDTH, _WIDTH_STEP = 8, 32


class Network(Protocol):
    """One-layer draft network over a slot cache; sequence i sits in slot i."""

    def refresh(self) -> None:
        """The weights were changed in place."""
        ...

    def read(self, sequences: Sequence[SequenceState], seen: Sequence[int], taps: torch.Tensor) -> torch.Tensor:
        """Reads each sequence's tokens from position ``seen + 1`` on, with the target's features before them; the newest
        output of each [B, hidden]. taps: as in `DraftContext`."""
        ...

    def step(self, tokens: torch.Tensor, hidden: torch.Tensor, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """One more token of each sequence. tokens: int64 [B], hidden: the last outputs [B, hidden] → the new outputs
        [B, hidden] and their logits [B, draft vocabulary]."""
        ...

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """[B, hidden] → [B, draft vocabulary]."""
        ...


def network_for(weights: Eagle3Model, embed_tokens: nn.Module, cache: SlotCache, capacity: int) -> Network:
    """The fastest network for the weights' device and dtype."""
    config = weights.config
    dtype, device = cache.shape.dtype, cache.device
    kernels = load_kernels(device.type, dtype)
    assert config.intermediate_size is not None and config.hidden_size is not None
    if kernels is not None and Kernels.serve(attention_shape(config)[2], config.hidden_size, config.intermediate_size):
        return NativeNetwork(weights, embed_tokens, cache, kernels, capacity)
    network = PaddedNetwork(weights, embed_tokens, cache)
    if device.type == "cuda":
        network.capture_graphs(CudaCapturer(), precapture=True)
    return network


class PaddedNetwork:
    """Torch's operators, any device. Sequences are padded to the one furthest behind; in the steady state all are about as far.

    Args:
        weights: Used as they are.
        embed_tokens: The target's input embedding.
        cache: Of one layer.
    """

    def __init__(self, weights: Eagle3Model, embed_tokens: nn.Module, cache: SlotCache) -> None:
        self._model, self._embed, self._cache = weights, embed_tokens, cache
        self._scaling = cache.shape.head_dim**-0.5
        self.graphs: GraphPool | None = None

    def refresh(self) -> None:
        """The weights are used in place."""

    def read(self, sequences: Sequence[SequenceState], seen: Sequence[int], taps: torch.Tensor) -> torch.Tensor:
        count = max(len(s.tokens) - 1 - at for s, at in zip(sequences, seen, strict=True))
        if count > _EXACT_WIDTH:  # few distinct shapes: a new one costs the kernel library a compilation
            count = -(-count // _WIDTH_STEP) * _WIDTH_STEP
        device = self._cache.device
        padded = [s.tokens[at + 1 : at + 1 + count] for s, at in zip(sequences, seen, strict=True)]
        tokens = torch.tensor([t + [0] * (count - len(t)) for t in padded], device=device)
        positions = torch.tensor(seen, device=device)[:, None] + torch.arange(count, device=device)
        positions = positions.clamp(max=min(self._cache.span, taps.shape[1]) - 1)  # past a slot's end it is overwritten later
        rows = torch.arange(len(sequences), device=device)
        features = taps[rows[:, None], positions][..., :-1, :].flatten(-2)
        out = self._run(tokens, self._model.fc(features), positions)
        last = torch.tensor([len(s.tokens) - 2 - at for s, at in zip(sequences, seen, strict=True)], device=device)
        return out[rows, last]

    def step(self, tokens: torch.Tensor, hidden: torch.Tensor, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        if self.graphs is not None:
            cache = self._cache
            replayed = self.graphs.run(tokens[:, None], positions, cache.span, cache.slots, hidden[:, None])
            if replayed is not None:
                return replayed[1][:, 0].clone(), replayed[0][:, 0]
        where = torch.tensor(positions, device=self._cache.device)[:, None]
        out = self._run(tokens[:, None], hidden[:, None], where)[:, 0]
        return out, self.logits(out)

    def capture_graphs(self, capturer: Capturer, precapture: bool) -> None:
        """Captures a draft step for every batch bucket at the cache's present span; other spans when they are met."""
        config, cache = self._model.config, self._cache
        heads, kv_heads, dim = attention_shape(config)
        assert config.intermediate_size is not None and config.hidden_size is not None
        size = cache.shape.dtype.itemsize
        shape = ModelShape(1, config.hidden_size, config.intermediate_size, heads, kv_heads, dim, config.draft_vocab_size, size)
        keys = plan_keys("draft", powers_of_two(cache.slots), (1,), (cache.span,), cache.slots)
        self.graphs = GraphPool(
            self._step_and_logits,
            plan_graphs(shape, keys),
            vocab=config.draft_vocab_size,
            carry=config.hidden_size,
            dtype=cache.shape.dtype,
            device=cache.device,
            capturer=capturer,
        )
        if precapture:
            self.graphs.capture_planned()

    def _step_and_logits(
        self, tokens: torch.Tensor, positions: torch.Tensor, carried: torch.Tensor | None, span: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert carried is not None
        hidden = self._run(tokens, carried, positions)
        return self.logits(hidden), hidden

    def _run(self, tokens: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        batch = ForwardBatch(slice(0, len(tokens)), positions, span=self._cache.span)
        self._cache.begin(batch)

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            keys, values = self._cache.update(key, value, 0)
            return grouped_attention(query, keys, values, batch.bias(None, query.dtype), self._scaling)

        return self._model.step(self._embed(tokens).to(hidden.dtype), hidden, positions, attend)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._model.logits(hidden)


class NativeNetwork:
    """The same layer (`Eagle3Model.step`) on the native kernels, CPU only.

    Args:
        weights: Read (and packed in bfloat16) by `refresh`.
        embed_tokens: The target's input embedding.
        cache: Of one layer.
        kernels: For the cache's dtype.
        capacity: Positions that rotary embeddings are kept for.
    """

    def __init__(self, weights: Eagle3Model, embed_tokens: nn.Module, cache: SlotCache, kernels: Kernels, capacity: int) -> None:
        self._embed, self._cache, self._kernels, self._dtype = embed_tokens, cache, kernels, cache.shape.dtype
        join = PackedLinear if can_pack(cache.device, self._dtype) else JoinedLinear
        layer, attention = weights.midlayer, weights.midlayer.self_attn
        self._fc, self._head = join(weights.fc), join(weights.lm_head)
        self._qkv = join(attention.q_proj, attention.k_proj, attention.v_proj)
        self._o, self._down = join(attention.o_proj), join(layer.mlp.down_proj)
        self._gate_up = join(layer.mlp.gate_proj, layer.mlp.up_proj)
        norms = (layer.input_layernorm, layer.hidden_norm, layer.post_attention_layernorm, weights.norm)
        self._norms = tuple(RootMeanSquareNorm(norm, self._dtype, kernels) for norm in norms)
        cos, sin = weights.rotary_at(torch.zeros(1, dtype=self._dtype), torch.arange(capacity)[None])
        self._cos, self._sin = cos[0], sin[0]
        self._rule = AttentionRule(cache.shape.head_dim**-0.5)

    def refresh(self) -> None:
        for part in (self._fc, self._head, self._qkv, self._o, self._down, self._gate_up, *self._norms):
            part.refresh()

    def read(self, sequences: Sequence[SequenceState], seen: Sequence[int], taps: torch.Tensor) -> torch.Tensor:
        counts = [len(s.tokens) - 1 - at for s, at in zip(sequences, seen, strict=True)]
        ragged = RaggedTokens(range(len(counts)), seen, counts)
        tokens = torch.tensor([t for s, at in zip(sequences, seen, strict=True) for t in s.tokens[at + 1 :]])
        features = taps.flatten(-2)[ragged.token_slots, ragged.positions][:, : -taps.shape[-1]]
        return self._run(tokens, self._fc(features[None]), ragged)[ragged.offsets[1:] - 1]

    def step(self, tokens: torch.Tensor, hidden: torch.Tensor, positions: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        count = len(positions)
        out = self._run(tokens, hidden[None], RaggedTokens(range(count), positions, [1] * count))
        return out, self.logits(out)

    def _run(self, tokens: torch.Tensor, hidden: torch.Tensor, ragged: RaggedTokens) -> torch.Tensor:
        """tokens: int64 [N], hidden: [1, N, hidden] → [N, hidden]."""
        of_embedding, of_hidden, of_mlp, _ = self._norms
        embedded = self._embed(tokens).to(self._dtype)[None]
        lines = self._cache.lines(0)
        rotary = self._cos[ragged.positions], self._sin[ragged.positions]
        joined = self._qkv(torch.cat([of_embedding(embedded), of_hidden(hidden)], dim=-1))
        heads = self._kernels.rotate_and_store(joined, rotary, None, 0.0, ragged, lines)
        hidden = self._o(self._kernels.attend(heads, lines, ragged, self._rule), hidden)
        gated = self._kernels.silu_gate(self._gate_up(of_mlp(hidden)))
        return self._down(gated, hidden)[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        return self._head(self._norms[-1](hidden[None]))[0]
