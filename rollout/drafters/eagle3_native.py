"""Running the EAGLE-3 layer for drafting on the native kernels: without padding, and few tokens in one
call.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from paceline.rollout.drafters.draft_network import Reading
from paceline.rollout.drafters.eagle3_model import Eagle3Model
from paceline.rollout.model.fused_layer import RootMeanSquareNorm
from paceline.rollout.model.kv_cache import SlotCache
from paceline.rollout.model.packed_linear import JoinedLinear, PackedLinear, can_pack
from paceline.rollout.native import AttentionRule, DraftLayer, Int8Rows, Kernels, RaggedTokens

_FEW_TOKENS = 16  # up to here a step is bound by reading weights, and one call with 8-bit weights is fastest


class NativeNetwork:
    """`Eagle3Model.step` on the native kernels, CPU only.

    Where weights are packed (bfloat16), steps of few tokens run in one call with weights in 8 bits: half the
    bytes to read, and no interpreter between the parts of the layer. Longer ones run part by part.

    Args:
        weights: Read (packed, and rounded) by `refresh`.
        embed_tokens: The target's input embedding.
        cache: Of one layer.
        kernels: For the cache's dtype.
        positions: How many rotary embeddings are kept for.
    """

    def __init__(
        self,
        weights: Eagle3Model,
        embed_tokens: nn.Module,
        cache: SlotCache,
        kernels: Kernels,
        positions: int,
    ) -> None:
        self._weights, self._embed, self._cache, self._kernels = weights, embed_tokens, cache, kernels
        self._dtype = cache.shape.dtype
        packs = can_pack(cache.device, self._dtype)
        join = PackedLinear if packs else JoinedLinear
        layer, attention = weights.midlayer, weights.midlayer.self_attn
        self._fc, self._head = join(weights.fc), join(weights.lm_head)
        self._qkv = join(attention.q_proj, attention.k_proj, attention.v_proj)
        self._o, self._down = join(attention.o_proj), join(layer.mlp.down_proj)
        self._gate_up = join(layer.mlp.gate_proj, layer.mlp.up_proj)
        norms = (layer.input_layernorm, layer.hidden_norm, layer.post_attention_layernorm, weights.norm)
        self._norms = tuple(RootMeanSquareNorm(norm, self._dtype, kernels) for norm in norms)
        cos, sin = weights.rotary_at(torch.zeros(1, dtype=self._dtype), torch.arange(positions)[None])
        self._cos, self._sin = cos[0].contiguous(), sin[0].contiguous()
        self._rule = AttentionRule(cache.shape.head_dim**-0.5)
        linears = [m for m in weights.modules() if isinstance(m, nn.Linear)]
        self._rounds = (
            packs
            and Int8Rows.serves(*((m.out_features, m.in_features) for m in linears))
            and _is_plain(embed_tokens)
        )
        self._table: torch.Tensor = next(embed_tokens.parameters())
        self._layer: DraftLayer | None = None

    def refresh(self) -> None:
        for part in (self._fc, self._head, self._qkv, self._o, self._down, self._gate_up, *self._norms):
            part.refresh()
        if not self._rounds:
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
        self._small_fc = Int8Rows(self._weights.fc.weight)

    def read(self, reading: Reading) -> tuple[torch.Tensor, torch.Tensor]:
        counts = reading.counts
        ragged = RaggedTokens(range(len(counts)), reading.places, counts, shift=reading.shift)
        tokens = torch.tensor(
            [t for s, at in zip(reading.sequences, reading.seen, strict=True) for t in s.tokens[at + 1 :]]
        )
        taps = reading.taps
        features = taps.flatten(-2)[ragged.token_slots, ragged.positions, : -taps.shape[-1]]
        few = self._layer is not None and len(tokens) <= _FEW_TOKENS
        hidden = self._kernels.multiply(features, self._small_fc) if few else self._fc(features[None])[0]
        out, logits = self._run(tokens, hidden, ragged, ragged.offsets[1:] - 1)
        return out, logits

    def step(
        self, tokens: torch.Tensor, hidden: torch.Tensor, seats: torch.Tensor, shift: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        batch, count = tokens.shape
        out, logits = self._run(
            tokens.flatten(), hidden.flatten(0, 1), RaggedTokens.from_seats(seats, shift), None
        )
        return out.view(batch, count, -1), logits.view(batch, count, -1)

    def _run(
        self, tokens: torch.Tensor, hidden: torch.Tensor, ragged: RaggedTokens, keep: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """tokens: int64 [N], hidden: [N, hidden] → outputs and logits of all, or of those in ``keep``."""
        lines = self._cache.lines(0)
        if self._layer is not None and len(tokens) <= _FEW_TOKENS:
            out, logits = self._kernels.draft_step(
                self._address, tokens, hidden, lines, ragged, len(self._layer.head.scales)
            )
            return (out, logits) if keep is None else (out[keep], logits[keep])
        of_embedding, of_hidden, of_mlp, of_head = self._norms
        hidden = hidden[None]
        embedded = self._embed(tokens).to(self._dtype)[None]
        rotary = self._cos[ragged.positions], self._sin[ragged.positions]
        joined = self._qkv(torch.cat([of_embedding(embedded), of_hidden(hidden)], dim=-1))
        heads = self._kernels.rotate_and_store(joined, rotary, None, 0.0, ragged, lines)
        hidden = self._o(self._kernels.attend(heads, lines, ragged, self._rule), hidden)
        gated = self._kernels.silu_gate(self._gate_up(of_mlp(hidden)))
        out = self._down(gated, hidden)
        out = out if keep is None else out[:, keep]
        return out[0], self._head(of_head(out))[0]


def _is_plain(embed_tokens: nn.Module) -> bool:
    """Whether the embedding is a table and nothing else (Gemma scales what it reads)."""
    return type(embed_tokens) is nn.Embedding
