"""The EAGLE-3 layer for drafting on torch's operators, and the choice of the fastest network of a device."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from paceline.rollout.drafters.draft_network import MASK, Network, Reading
from paceline.rollout.drafters.eagle3_model import Eagle3Model, attention_shape
from paceline.rollout.drafters.eagle3_native import NativeNetwork, draft_shape, embedding_address
from paceline.rollout.graphs.graph_plan import plan_graphs, plan_keys, powers_of_two
from paceline.rollout.graphs.graph_pool import Capturer, GraphPool
from paceline.rollout.model.attention import ForwardBatch, chain_seats, grouped_attention
from paceline.rollout.model.kv_cache import CacheShape, SlotCache
from paceline.rollout.model.paged_cache import PagedCache
from paceline.rollout.native import load_kernels, upload

# Rows are padded to the longest one; if that exceeds _EXACT_WIDTH tokens, to a multiple of _WIDTH_STEP. A new
# shape costs the kernel library a compilation, so that distinct shapes must be few.
_EXACT_WIDTH, _WIDTH_STEP = 8, 32


def network_for(
    weights: Eagle3Model, embed_tokens: nn.Module, shape: CacheShape, device: torch.device, capacity: int
) -> tuple[Network, SlotCache | PagedCache]:
    """Returns the fastest network for the weights' device and dtype, and its cache.

    Args:
        weights: Model whose weights are used.
        embed_tokens: The target's input embedding.
        shape: Size of the draft cache.
        device: Device of the weights.
        capacity: Number of positions that a text may have.
    """
    config = weights.config
    kernels = load_kernels(device.type, shape.dtype)
    assert config.intermediate_size is not None and config.hidden_size is not None
    network: NativeNetwork | PaddedNetwork
    if kernels is not None and kernels.serve(
        attention_shape(config)[2], config.hidden_size, config.intermediate_size
    ):
        cache = (PagedCache if kernels.paged else SlotCache)(shape, device)
        network = NativeNetwork(weights, embed_tokens, cache, kernels, capacity)
    else:
        cache = SlotCache(shape, device)
        network = PaddedNetwork(weights, embed_tokens, cache)
    return network, cache


class PaddedNetwork:
    """Runs the layer on torch's operators, on any device.

    Sequences are padded to the one with the most tokens to read; in the steady state all have about as many.

    Args:
        weights: Model whose weights are used in place.
        embed_tokens: The target's input embedding.
        cache: Draft cache of one layer.
    """

    def __init__(self, weights: Eagle3Model, embed_tokens: nn.Module, cache: SlotCache) -> None:
        self._model, self._embed, self._cache = weights, embed_tokens, cache
        self._scaling = cache.shape.head_dim**-0.5
        self.graphs: GraphPool | None = None

    def refresh(self) -> None:
        """Does nothing: the weights are used in place."""

    def read(self, reading: Reading) -> tuple[torch.Tensor, torch.Tensor]:
        """Reads committed tokens, padded to a rectangle, see `Network.read`."""
        lengths, places = reading.lengths, reading.places
        count = max(lengths)
        if count > _EXACT_WIDTH:
            count = -(-count // _WIDTH_STEP) * _WIDTH_STEP
        device, taps = self._cache.device, reading.taps
        tokens = upload([t + [0] * (count - len(t)) for t in reading.tokens], device)
        place = upload(places, device)[:, None] + torch.arange(count, device=device)
        place = place.clamp(max=self._cache.span - 1)  # padding past a slot's end is overwritten later
        shift = upload(reading.shift, device)[:, None]
        rows = torch.arange(len(tokens), device=device)
        slots = rows[:, None].expand_as(place).flatten()
        features = taps(slots, (place + shift).flatten()).view(*place.shape, -1)
        features = features[..., : self._model.fc.in_features]
        if self._model.mask_token is not None:
            masked = tokens == MASK
            features = torch.where(masked[..., None], self._model.mask_hidden, features)
            tokens = tokens.masked_fill(masked, self._model.mask_token)
        out = self._run(tokens, self._model.fc(features), chain_seats(place), shift)
        first = upload(lengths, device) - 1 - reading.masks
        newest = out[rows[:, None], first[:, None] + torch.arange(1 + reading.masks, device=device)]
        return newest, self._model.logits(newest)

    def step(
        self, tokens: torch.Tensor, hidden: torch.Tensor, seats: torch.Tensor, shift: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs more tokens of each sequence, by a CUDA graph where one fits; see `Network.step`."""
        cache = self._cache
        if self.graphs is not None and not any(shift):
            self.graphs.follow(embedding_address(self._embed))
            replayed = self.graphs.run(tokens, seats, cache.span, cache.slots, hidden)
            if replayed is not None:
                return replayed[1].clone(), replayed[0]
        out = self._run(tokens, hidden, seats, upload(shift, cache.device)[:, None])
        return out, self._model.logits(out)

    def capture_graphs(self, capturer: Capturer, precapture: bool) -> None:
        """Captures a draft step for every batch bucket at the cache's present span.

        Graphs for other spans are captured when they are first needed.
        """
        config, cache = self._model.config, self._cache
        shape = draft_shape(config, cache.shape.dtype)
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
        self.graphs.follow(embedding_address(self._embed))
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
