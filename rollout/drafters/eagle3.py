"""Drafting with the EAGLE-3 model, over its own one-layer slot cache."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import nn

from rollout.attention import ForwardBatch, grouped_attention
from rollout.drafters.base import DraftContext
from rollout.drafters.eagle3_model import Eagle3Model, attention_shape
from rollout.kv_cache import CacheShape, SlotCache
from rollout.packed_linear import can_pack, pack_linears
from rollout.randomness import Stream, uniforms
from rollout.sampling import draw
from rollout.sequence import SequenceState
from rollout.trees.chain import DraftTree, chain_parents

_EXACT_WIDTH, _WIDTH_STEP = 8, 32


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
        self.embed_tokens = embed_tokens
        with torch.device(device):
            self.model = Eagle3Model(config, model.vocabulary).to(dtype=dtype).requires_grad_(False).eval()
            packing = can_pack(device, dtype)
            self._weights = Eagle3Model(config, model.vocabulary).to(dtype=dtype).requires_grad_(False) if packing else self.model
        self._packed = pack_linears(self.model, self._weights) if packing else []
        shape = CacheShape(1, kv_heads, head_dim, slots, capacity, 0, dtype)
        self.cache = SlotCache(shape, device)
        self._seen = [0] * slots
        self._scaling = head_dim**-0.5
        self._dtype = dtype
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
        if self._packed:
            own = dict(self.model.named_parameters())
            for name, parameter in self._weights.named_parameters():
                if name in own:
                    own[name].copy_(parameter)
            for layer in self._packed:
                layer.refresh()
        self.vocabulary = self._weights.vocabulary.clone()

    @torch.no_grad()
    def propose(self, context: DraftContext, depth: int) -> DraftTree:
        assert context.taps is not None, "the EAGLE-3 drafter needs an engine that keeps taps"
        sequences = context.sequences
        longest = max(len(s.tokens) for s in sequences)
        lengths = torch.tensor([len(s.tokens) for s in sequences], device=self.cache.device)
        held = len(sequences) if any(self._seen) else 0
        self.cache.reserve(longest + depth, active=held, slots=len(sequences))
        hidden = self._catch_up(sequences, context.taps, lengths)
        tokens, probs = [], []
        for offset in range(depth):
            token, q = self._pick(self.model.logits(hidden), sequences, offset)
            tokens.append(token)
            probs.append(q)
            if offset + 1 < depth:
                positions = (lengths - 1 + offset)[:, None]
                hidden = self._run(token[:, None], hidden[:, None], positions)[:, 0]
        drafted = torch.full((len(sequences),), depth)
        parents = chain_parents(len(sequences), depth)
        stacked = torch.stack([q for q in probs if q is not None], 1) if self.sample else None
        return DraftTree(torch.stack(tokens, 1), parents, drafted, stacked, self.vocabulary if self.sample else None)

    def _catch_up(self, sequences: Sequence[SequenceState], taps: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Reads the features of tokens committed since the last draft. Returns the newest output of each slot [B, hidden].

        One forward, padded to the slot that is furthest behind: in a step where all were decoded plainly until now, and in the
        steady state, they are about equally far.
        """
        most = max(len(s.tokens) - 1 - self._seen[slot] for slot, s in enumerate(sequences))
        if most > _EXACT_WIDTH:  # few distinct shapes: a new one costs the kernel library a compilation
            most = -(-most // _WIDTH_STEP) * _WIDTH_STEP
        out = self._read(sequences, taps, most)
        last = torch.tensor([len(s.tokens) - 2 - self._seen[slot] for slot, s in enumerate(sequences)], device=out.device)
        for slot, sequence in enumerate(sequences):
            self._seen[slot] = len(sequence.tokens) - 1
        return out[torch.arange(len(sequences), device=out.device), last]

    def _read(self, sequences: Sequence[SequenceState], taps: torch.Tensor, count: int) -> torch.Tensor:
        """Runs ``count`` positions from each slot's first unread one. Those past a slot's end are overwritten later."""
        device = self.cache.device
        first = self._seen[: len(sequences)]
        padded = [s.tokens[at + 1 : at + 1 + count] for s, at in zip(sequences, first, strict=True)]
        tokens = torch.tensor([t + [0] * (count - len(t)) for t in padded], device=device)
        positions = torch.tensor(first, device=device)[:, None] + torch.arange(count, device=device)
        positions = positions.clamp(max=min(self.cache.span, taps.shape[1]) - 1)
        features = taps[torch.arange(len(sequences), device=device)[:, None], positions][..., :-1, :].flatten(-2)
        return self._run(tokens, self.model.fc(features), positions)

    def _run(self, tokens: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        batch = ForwardBatch(slice(0, len(tokens)), positions, span=self.cache.span)
        self.cache.begin(batch)

        def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
            keys, values = self.cache.update(key, value, 0)
            return grouped_attention(query, keys, values, batch.bias(None, query.dtype), self._scaling)

        return self.model.step(self.embed_tokens(tokens).to(self._dtype), hidden, positions, attend)

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
