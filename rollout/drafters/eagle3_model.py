"""The EAGLE-3 draft model: one decoder layer over token embedding and fused target features.

EAGLE-3: "Scaling up Inference Acceleration of Large Language Models via Training-Time Test" (arXiv
2503.01840), section 3.1. Parameter names are those of the checkpoints that vLLM and SGLang load
(``LlamaForCausalLMEagle3``).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, PretrainedConfig
from transformers.models.llama.modeling_llama import (
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from paceline.rollout.model.shape import intermediate_size, key_shape

ARCHITECTURE = "LlamaForCausalLMEagle3"
MASK_TOKEN = "ptd_token_id"  # vLLM's key for the token that later positions of drafts in one pass read

# first tokens of a text, to which drafters attend strongly at every distance (LongSpec, arXiv 2502.17421)
SINKS = 4

Attend = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def eagle3_config(
    target: PretrainedConfig, draft_vocab_size: int, tap_layers: Sequence[int], parallel: bool = False
) -> LlamaConfig:
    """Returns the configuration of a drafter for ``target``, in the format of the exported checkpoint.

    Args:
        target: The policy's config.
        draft_vocab_size: Size of the trimmed vocabulary.
        tap_layers: The three layers whose inputs the drafter reads.
        parallel: Whether it can draft several tokens in one pass.

    Raises:
        ValueError: The draft vocabulary is larger than the target's, or the target's embeddings are narrower
            than its hidden states.
    """
    text = target.get_text_config()
    if not 0 < draft_vocab_size <= text.vocab_size:
        raise ValueError(
            f"drafter.draft_vocab_size is {draft_vocab_size}, the target has {text.vocab_size} tokens: write "
            f"1 to {text.vocab_size}"
        )
    if getattr(text, "word_embed_proj_dim", text.hidden_size) != text.hidden_size:
        raise ValueError(
            "speculation.drafters has eagle3, which needs embeddings as wide as the hidden states, but the "
            f"target's widths are {text.word_embed_proj_dim} and {text.hidden_size}: write other drafters"
        )
    keys = key_shape(text)
    extra: dict[str, Any] = {
        "draft_vocab_size": draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": list(tap_layers),
    }
    if parallel:
        extra[MASK_TOKEN] = mask_token_of(text)
    return LlamaConfig(
        architectures=[ARCHITECTURE],
        vocab_size=text.vocab_size,
        hidden_size=text.hidden_size,
        intermediate_size=intermediate_size(text),
        num_hidden_layers=1,
        num_attention_heads=text.num_attention_heads,
        num_key_value_heads=keys.kv_heads,
        head_dim=keys.head_dim,
        max_position_embeddings=text.max_position_embeddings,
        rms_norm_eps=getattr(text, "rms_norm_eps", 1e-5),
        rope_parameters={"rope_type": "default", "rope_theta": _rope_theta(text)},
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
        **extra,
    )


def mask_token_of(target: PretrainedConfig) -> int:
    """Returns the token whose embedding drafts in one pass read at later positions: the end of the text."""
    end = target.get_text_config().eos_token_id
    return int(end[0] if isinstance(end, list) else end or 0)


def _rope_theta(config: PretrainedConfig) -> float:
    parameters = getattr(config, "rope_parameters", None) or {}
    return float(parameters.get("rope_theta", 10000.0))


def attention_shape(config: LlamaConfig) -> tuple[int, int, int]:
    """Returns (heads, key/value heads, head dimension) of a drafter's config."""
    assert config.num_key_value_heads is not None and config.head_dim is not None
    return config.num_attention_heads, config.num_key_value_heads, config.head_dim


def parameter_count(config: LlamaConfig) -> int:
    """Counts the parameters of a drafter with a config from `eagle3_config`, without building it."""
    heads, kv_heads, dim = attention_shape(config)
    hidden, taps = config.hidden_size, len(config.eagle_aux_hidden_state_layer_ids)
    attention = 2 * hidden * (heads + 2 * kv_heads) * dim + heads * dim * hidden
    norms = 4 * hidden
    mask = taps * hidden if getattr(config, MASK_TOKEN, None) is not None else 0
    linears = hidden * (taps * hidden + 3 * config.intermediate_size + config.draft_vocab_size)
    return linears + attention + norms + mask


class _Attention(nn.Module):
    """Attention over the concatenated embedding and hidden state of each token."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        heads, kv_heads, dim = attention_shape(config)
        width = 2 * config.hidden_size
        self.head_dim = dim
        self.q_proj = nn.Linear(width, heads * dim, bias=False)
        self.k_proj = nn.Linear(width, kv_heads * dim, bias=False)
        self.v_proj = nn.Linear(width, kv_heads * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, config.hidden_size, bias=False)

    def forward(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], attend: Attend
    ) -> torch.Tensor:
        batch, length, _ = x.shape
        query, key, value = (
            projection(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        query, key = apply_rotary_pos_emb(query, key, *rotary)
        return self.o_proj(attend(query, key, value).reshape(batch, length, -1))

    def keys(
        self, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the keys and values [B, KV, L, d] of inputs [B, L, 2 hidden]."""
        key, value = (
            projection(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for projection in (self.k_proj, self.v_proj)
        )
        return apply_rotary_pos_emb(key, key, *rotary)[1], value


class _Midlayer(nn.Module):
    """The decoder layer: attention over embedding and hidden state, then an MLP, both residual."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__()
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.hidden_norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = _Attention(config)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = LlamaMLP(config)

    def forward(
        self,
        embeds: torch.Tensor,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        attend: Attend,
    ) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.attention_input(embeds, hidden), rotary, attend)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))

    def attention_input(self, embeds: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
        """Returns what attention reads, [B, L, 2 hidden]."""
        return torch.cat([self.input_layernorm(embeds), self.hidden_norm(hidden)], dim=-1)


class Eagle3Model(nn.Module):
    """Predicts token i + 2 from token i + 1 and the target's features at position i.

    Args:
        config: Configuration from `eagle3_config`.
        vocabulary: int64 [draft vocabulary], the target ids that can be drafted, in increasing order.

    Attributes:
        mask_token: Token id that later positions of drafts in one pass read; None for a drafter that drafts
            one token a pass only (``ptd_token_id`` of the config, P-EAGLE, arXiv 2602.01469).
        mask_hidden: [1, taps * hidden], what these positions read in place of the target's features; there is
            none without ``mask_token``.
        d2t: int64 [draft vocabulary], offset from draft id to target id.
        t2d: bool [vocabulary], which target ids can be drafted.
    """

    d2t: torch.Tensor
    t2d: torch.Tensor

    def __init__(self, config: LlamaConfig, vocabulary: torch.Tensor) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(
            len(config.eagle_aux_hidden_state_layer_ids) * config.hidden_size, config.hidden_size, bias=False
        )
        self.midlayer = _Midlayer(config)
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.lm_head = nn.Linear(config.hidden_size, config.draft_vocab_size, bias=False)
        self.rotary = LlamaRotaryEmbedding(config)
        self.mask_token: int | None = getattr(config, MASK_TOKEN, None)
        if self.mask_token is not None:
            self.mask_hidden = nn.Parameter(torch.zeros(1, self.fc.in_features))
        self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
        self.register_buffer("t2d", torch.zeros(config.vocab_size, dtype=torch.bool))
        self.set_vocabulary(vocabulary)

    def set_vocabulary(self, vocabulary: torch.Tensor) -> None:
        """Sets which target ids can be drafted: int64 [draft vocabulary], strictly increasing.

        Raises:
            ValueError: The ids are not increasing, or not as many as the config has.
        """
        if len(vocabulary) != self.config.draft_vocab_size or not bool((vocabulary.diff() > 0).all()):
            raise ValueError(
                f"the draft vocabulary is not strictly increasing or has another size than the config: pass "
                f"{self.config.draft_vocab_size} increasing target ids"
            )
        vocabulary = vocabulary.to(self.d2t.device)
        self.d2t.copy_(vocabulary - torch.arange(len(vocabulary), device=vocabulary.device))
        self.t2d.zero_()
        self.t2d[vocabulary] = True

    @property
    def vocabulary(self) -> torch.Tensor:
        """The target id of each draft id: int64 [draft vocabulary]."""
        return self.d2t + torch.arange(len(self.d2t), device=self.d2t.device)

    def rotary_at(
        self, reference: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the rotary embeddings of positions.

        Args:
            reference: Tensor whose dtype and device the result has.
            positions: int64 [B, L].

        Returns:
            Cosines and sines, [B, L, head_dim] each.
        """
        return self.rotary(reference, positions)

    def step(
        self, embeds: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor, attend: Attend
    ) -> torch.Tensor:
        """Runs the layer once.

        Args:
            embeds: [B, L, hidden], the target's embedding of the tokens.
            hidden: [B, L, hidden], ``fc`` of the target's features, or this model's own previous output.
            positions: int64 [B, L], positions of the tokens.
            attend: Maps query [B, H, L, d], key and value [B, KV, L, d] to [B, L, H, d]; the caller keeps the
                cache.

        Returns:
            [B, L, hidden], which `logits` reads, and which is fed back as ``hidden`` at the next draft
            position.
        """
        return self.midlayer(embeds, hidden, self.rotary_at(hidden, positions), attend)

    def keys(
        self, embeds: torch.Tensor, hidden: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the keys and values [B, KV, L, d] that `step` passes to ``attend``, and computes no more.

        Args:
            embeds: [B, L, hidden], the target's embedding of the tokens.
            hidden: [B, L, hidden], ``fc`` of the target's features.
            positions: int64 [B, L], positions of the tokens.
        """
        layer = self.midlayer
        return layer.self_attn.keys(layer.attention_input(embeds, hidden), self.rotary_at(hidden, positions))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Returns logits [..., draft vocabulary] of outputs [..., hidden]."""
        return self.lm_head(self.norm(hidden))
