"""The EAGLE-3 layer for drafting on the native kernels: without padding, few tokens in a single call."""

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

_FEW_TOKENS = 16  # up to this many, reading weights dominates, and one call with 8-bit weights is fastest


class NativeNetwork:
    """Runs `Eagle3Model.step` on the native kernels, CPU only.

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
        self._use_int8 = (
            packs
            and Int8Rows.serves(*((m.out_features, m.in_features) for m in linears))
            and _is_plain(embed_tokens)
        )
        self._table: torch.Tensor = next(embed_tokens.parameters())
        self._layer: DraftLayer | None = None

    def refresh(self) -> None:
        """Packs the weights again after they changed, and rounds them to 8 bits where that is used."""
        for part in (self._fc, self._head, self._qkv, self._o, self._down, self._gate_up, *self._norms):
            part.refresh()
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
        counts = reading.counts
        ragged = RaggedTokens(range(len(counts)), reading.places, counts, shift=reading.shift)
        tokens = torch.tensor(
            [t for s, at in zip(reading.sequences, reading.seen, strict=True) for t in s.tokens[at + 1 :]]
        )
        taps = reading.taps
        features = taps.flatten(-2)[ragged.token_slots, ragged.positions, : -taps.shape[-1]]
        few = self._layer is not None and len(tokens) <= _FEW_TOKENS
        hidden = self._kernels.multiply(features, self._int8_fc) if few else self._fc(features[None])[0]
        out, logits = self._run(tokens, hidden, ragged, ragged.offsets[1:] - 1)
        return out, logits

    def step(
        self, tokens: torch.Tensor, hidden: torch.Tensor, seats: torch.Tensor, shift: Sequence[int]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs more tokens of each sequence, see `Network.step`."""
        batch, count = tokens.shape
        out, logits = self._run(
            tokens.flatten(), hidden.flatten(0, 1), RaggedTokens.from_seats(seats, shift), None
        )
        return out.view(batch, count, -1), logits.view(batch, count, -1)

    def _run(
        self, tokens: torch.Tensor, hidden: torch.Tensor, ragged: RaggedTokens, keep: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Runs tokens int64 [N] with hidden states [N, hidden].

        Returns:
            Outputs and logits of all tokens, or of those in ``keep``.
        """
        lines = self._cache.lines(0)
        if self._layer is not None and len(tokens) <= _FEW_TOKENS:
            out, logits = self._kernels.draft_step(
                self._address, tokens, hidden, lines, ragged, len(self._layer.head.scales)
            )
            return (out, logits) if keep is None else (out[keep], logits[keep])
        embedding_norm, hidden_norm, mlp_norm, head_norm = self._norms
        hidden = hidden[None]
        embedded = self._embed(tokens).to(self._dtype)[None]
        rotary = self._cos[ragged.positions], self._sin[ragged.positions]
        joined = self._qkv(torch.cat([embedding_norm(embedded), hidden_norm(hidden)], dim=-1))
        heads = self._kernels.rotate_and_store(joined, rotary, None, 0.0, ragged, lines)
        hidden = self._o(self._kernels.attend(heads, lines, ragged, self._rule), hidden)
        gated = self._kernels.silu_gate(self._gate_up(mlp_norm(hidden)))
        out = self._down(gated, hidden)
        out = out if keep is None else out[:, keep]
        return out[0], self._head(head_norm(out))[0]


def _is_plain(embed_tokens: nn.Module) -> bool:
    """Whether the embedding is a lookup table and nothing else (Gemma scales its embeddings)."""
    return type(embed_tokens) is nn.Embedding
