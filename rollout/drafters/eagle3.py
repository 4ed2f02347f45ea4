"""Drafting with the EAGLE-3 model, over its own one-layer slot cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from rollout.drafters.base import DraftContext
from rollout.drafters.eagle3_model import Eagle3Model, attention_shape
from rollout.drafters.eagle3_network import network_for
from rollout.kv_cache import CacheShape, SlotCache
from rollout.randomness import Stream, uniforms
from rollout.sampling import draw
from rollout.sequence import SequenceState
from rollout.trees.chain import DraftTree, chain_parents


class Eagle3Drafter:
    """Chain drafting with an `Eagle3Model`.

    The features of committed tokens are read from the engine's taps when a draft is wanted, not before, so that a batch
    decoded plainly pays nothing for the drafter.

    Args:
        model: Weights to start from; they are copied (and packed on a CPU in bfloat16).
        embed_tokens: The target's input embedding, shared.
        slots: Sequences decoded together.
        capacity: Tokens a slot holds.
        dtype: What to compute in.
        sample: Draw draft tokens from the drafter's distribution at the request's temperature. Otherwise take the most likely
            one, which is deterministic: tokens are then those of plain decoding with the same seed.
    """

    name = "eagle3"
    needs_taps = True

    def __init__(
        self,
        model: Eagle3Model,
        embed_tokens: nn.Module,
        *,
        slots: int,
        capacity: int,
        dtype: torch.dtype,
        sample: bool = False,
    ) -> None:
        device = next(embed_tokens.parameters()).device
        config = model.config
        _, kv_heads, head_dim = attention_shape(config)
        self.sample = sample
        with torch.device(device):
            self._weights = Eagle3Model(config, model.vocabulary).to(dtype=dtype).requires_grad_(False).eval()
        self._weights.load_state_dict(model.state_dict())
        self.cache = SlotCache(CacheShape(1, kv_heads, head_dim, slots, capacity, 0, dtype), device)
        self._network = network_for(self._weights, embed_tokens, self.cache, capacity)
        self._seen = [0] * slots
        self.load_weights(model)

    @torch.no_grad()
    def load_weights(self, source: Eagle3Model) -> None:
        """Takes over the weights and vocabulary of ``source``, any float dtype. Call between rollouts.

        Raises:
            ValueError: for NaN or infinite weights; the present ones stay.
        """
        broken = [name for name, p in source.named_parameters() if not bool(torch.isfinite(p).all())]
        if broken:
            raise ValueError(f"the drafter's {broken[0]} has NaN or infinite values: the last good drafter stays in use")
        self._weights.load_state_dict(source.state_dict())
        self._network.refresh()
        self.vocabulary = self._weights.vocabulary.clone()

    @torch.no_grad()
    def propose(self, context: DraftContext, depth: int) -> DraftTree:
        assert context.taps is not None, "the EAGLE-3 drafter needs an engine that keeps taps"
        sequences = context.sequences
        held = len(sequences) if any(self._seen) else 0
        self.cache.reserve(max(len(s.tokens) for s in sequences) + depth, active=held, slots=len(sequences))
        hidden = self._network.read(sequences, self._seen[: len(sequences)], context.taps)
        self._seen[: len(sequences)] = [len(s.tokens) - 1 for s in sequences]
        logits = self._network.logits(hidden)
        tokens, probs = [], []
        for offset in range(depth):
            token, q = self._pick(logits, sequences, offset)
            tokens.append(token)
            probs.append(q)
            if offset + 1 < depth:
                hidden, logits = self._network.step(token, hidden, [len(s.tokens) - 1 + offset for s in sequences])
        drafted = torch.full((len(sequences),), depth)
        parents = chain_parents(len(sequences), depth)
        stacked = torch.stack([q for q in probs if q is not None], 1) if self.sample else None
        return DraftTree(torch.stack(tokens, 1), parents, drafted, stacked, self.vocabulary if self.sample else None)

    def _pick(
        self, logits: torch.Tensor, sequences: Sequence[SequenceState], offset: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Next draft token (target ids) int64 [B] and, when sampling, the distribution it was drawn from [B, draft vocabulary]."""
        if not self.sample:
            return self.vocabulary[logits.argmax(-1)], None
        params = [s.request.params for s in sequences]
        temperatures = torch.tensor([p.temperature or 1.0 for p in params], device=logits.device)
        q = torch.softmax(logits.float() / temperatures[:, None], dim=-1)
        greedy = torch.tensor([p.greedy for p in params], device=logits.device)[:, None]
        best = q.argmax(-1, keepdim=True)
        q = torch.where(greedy, torch.zeros_like(q).scatter_(-1, best, 1.0), q)
        seeds = np.array([s.request.seed for s in sequences])
        positions = np.array([[len(s.tokens) + offset] for s in sequences])
        return self.vocabulary[draw(q, uniforms(seeds, positions, Stream.DRAFT)[:, 0])], q

    def observe(self, sequence: SequenceState, count: int) -> None:
        """Features are read from the taps when the next draft is wanted: nothing to do."""

    def move(self, source: int, target: int) -> None:
        self.cache.copy_slot(source, [target], min(self._seen[source], self.cache.span))
        self._seen[target] = self._seen[source]

    def release(self, slot: int) -> None:
        if self._seen[slot]:
            self._seen[slot] = 0
            self.cache.clear_slot(slot)

    def forget(self, sequence: SequenceState) -> None:
        """State is by slot, not by sequence: nothing to do."""
