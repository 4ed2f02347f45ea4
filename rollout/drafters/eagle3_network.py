"""Running the EAGLE-3 layer for drafting: what it takes, and padded on torch's operators."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import nn

from paceline.rollout.drafters.eagle3_model import Eagle3Model, attention_shape
from paceline.rollout.model.attention import ForwardBatch, chain_seats, grouped_attention
from paceline.rollout.model.graph_plan import ModelShape, plan_graphs, plan_keys, powers_of_two
from paceline.rollout.model.graph_pool import Capturer, CudaCapturer, GraphPool
from paceline.rollout.model.kv_cache import SlotCache
from paceline.rollout.native import Kernels, load_kernels
from paceline.rollout.sequence import SequenceState

_EXACT_WIDTH, _WIDTH_STEP = 8, 32


@dataclass(frozen=True, slots=True)
class Reading:
    """Committed tokens that a drafter has not read yet; sequence i sits in slot i.

    Attributes:
        sequences: In slot order.
        seen: Positions of each that were read: token ``seen + 1`` is the next, with the target's features at
            position ``seen``.
        shift: Position of place 0 of each slot of the draft cache.
        taps: As in `DraftContext`.
    """

    sequences: Sequence[SequenceState]
    seen: Sequence[int]
    shift: Sequence[int]
    taps: torch.Tensor

    @property
    def counts(self) -> list[int]:
        """Tokens of each sequence to read."""
        return [len(s.tokens) - 1 - at for s, at in zip(self.sequences, self.seen, strict=True)]

    @property
    def places(self) -> list[int]:
        """Place of each sequence's first token to read."""
        return [at - shift for at, shift in zip(self.seen, self.shift, strict=True)]


class Network(Protocol):
    """One-layer draft network over a slot cache; sequence i sits in slot i."""

    def refresh(self) -> None:
        """The weights were changed in place."""
        ...

    def read(self, reading: Reading) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads tokens; the newest output of each sequence [B, hidden] and its logits [B, draft
        vocabulary]."""
        ...

    def step(
        self, tokens: torch.Tensor, hidden: torch.Tensor, seats: torch.Tensor, shift: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """E more tokens of each sequence.

        Args:
            tokens: int64 [B, E].
            hidden: [B, E, hidden], the output of each one's parent.
            seats: int64 [4, B, E], as in `ForwardBatch`, counted from place 0 of each slot; E adjacent places
                a row.
            shift: Position of that place.

        Returns:
            The new outputs [B, E, hidden] and their logits [B, E, draft vocabulary].
        """
        ...


def network_for(weights: Eagle3Model, embed_tokens: nn.Module, cache: SlotCache, capacity: int) -> Network:
    """The fastest network for the weights' device and dtype."""
    config = weights.config
    dtype, device = cache.shape.dtype, cache.device
    kernels = load_kernels(device.type, dtype)
    assert config.intermediate_size is not None and config.hidden_size is not None
    if kernels is not None and Kernels.serve(
        attention_shape(config)[2], config.hidden_size, config.intermediate_size
    ):
        from paceline.rollout.drafters.eagle3_native import NativeNetwork

        return NativeNetwork(weights, embed_tokens, cache, kernels, capacity)
    network = PaddedNetwork(weights, embed_tokens, cache)
    if device.type == "cuda":
        network.capture_graphs(CudaCapturer(), precapture=True)
    return network


class PaddedNetwork:
    """Torch's operators, any device. Sequences are padded to the one furthest behind; in the steady state all
    are about as far.

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

    def read(self, reading: Reading) -> tuple[torch.Tensor, torch.Tensor]:
        counts, places = reading.counts, reading.places
        count = max(counts)
        if count > _EXACT_WIDTH:  # few distinct shapes: a new one costs the kernel library a compilation
            count = -(-count // _WIDTH_STEP) * _WIDTH_STEP
        device, taps = self._cache.device, reading.taps
        padded = [
            s.tokens[at + 1 : at + 1 + count] for s, at in zip(reading.sequences, reading.seen, strict=True)
        ]
        tokens = torch.tensor([t + [0] * (count - len(t)) for t in padded], device=device)
        place = torch.tensor(places, device=device)[:, None] + torch.arange(count, device=device)
        place = place.clamp(max=self._cache.span - 1)  # past a slot's end it is overwritten later
        shift = torch.tensor(reading.shift, device=device)[:, None]
        rows = torch.arange(len(tokens), device=device)
        features = taps[rows[:, None], (place + shift).clamp(max=taps.shape[1] - 1)][..., :-1, :].flatten(-2)
        out = self._run(tokens, self._model.fc(features), chain_seats(place), shift)
        newest = out[rows, torch.tensor(counts, device=device) - 1]
        return newest, self._model.logits(newest)

    def step(
        self, tokens: torch.Tensor, hidden: torch.Tensor, seats: torch.Tensor, shift: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        cache = self._cache
        if self.graphs is not None and not any(shift):
            replayed = self.graphs.run(tokens, seats, cache.span, cache.slots, hidden)
            if replayed is not None:
                return replayed[1].clone(), replayed[0]
        out = self._run(tokens, hidden, seats, torch.tensor(shift, device=cache.device)[:, None])
        return out, self._model.logits(out)

    def capture_graphs(self, capturer: Capturer, precapture: bool) -> None:
        """Captures a draft step for every batch bucket at the cache's present span; other spans when they are
        met.
        """
        config, cache = self._model.config, self._cache
        heads, kv_heads, dim = attention_shape(config)
        assert config.intermediate_size is not None and config.hidden_size is not None
        size = cache.shape.dtype.itemsize
        shape = ModelShape(
            1,
            config.hidden_size,
            config.intermediate_size,
            heads,
            kv_heads,
            dim,
            config.draft_vocab_size,
            size,
        )
        keys = plan_keys("draft", powers_of_two(cache.slots), (1, 4), (cache.span,), 4 * cache.slots)
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
        self, tokens: torch.Tensor, seats: torch.Tensor, carried: torch.Tensor | None, span: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        assert carried is not None
        hidden = self._run(tokens, carried, seats, None)
        return self._model.logits(hidden), hidden

    def _run(
        self, tokens: torch.Tensor, hidden: torch.Tensor, seats: torch.Tensor, shift: torch.Tensor | None
    ) -> torch.Tensor:
        batch = ForwardBatch(slice(0, len(tokens)), seats, span=self._cache.span)
        self._cache.begin(batch)

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            keys, values = self._cache.update(key, value, 0)
            return grouped_attention(query, keys, values, batch.bias(None, query.dtype), self._scaling)

        positions = batch.positions if shift is None else batch.positions + shift
        return self._model.step(self._embed(tokens).to(hidden.dtype), hidden, positions, attend)
