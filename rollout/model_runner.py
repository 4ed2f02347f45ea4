"""Forwards of the target: prefill, and decode or verify, with taps on the hidden states."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rollout.attention import ForwardBatch
from rollout.inference_view import InferenceView
from rollout.kv_cache import CacheShape, SlotCache
from rollout.layer_probe import decoder_layers


def default_tap_layers(num_layers: int) -> tuple[int, int, int]:
    """EAGLE-3's low, middle and high features as vLLM numbers them: the inputs of layers 2, L // 2 and L − 3."""
    low, middle, high = sorted((min(2, num_layers - 1), num_layers // 2, max(num_layers - 3, 0)))
    return low, middle, high


class ModelRunner:
    """Runs the policy over a `SlotCache`.

    Args:
        model: The trainer's unwrapped causal LM.
        dtype: What to compute in; parameters are shared where this is their dtype.
        slots: Sequences decoded together.
        capacity: Tokens a slot holds.
        tap_layers: Layers whose *inputs* are kept for every token; empty keeps nothing.
        limit_bytes: Memory allowed for the cache; None for what is free.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        dtype: torch.dtype,
        slots: int,
        capacity: int,
        tap_layers: Sequence[int] = (),
        limit_bytes: int | None = None,
    ) -> None:
        config = model.config.get_text_config()
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.tap_layers = tuple(tap_layers)
        heads = config.num_attention_heads
        shape = CacheShape(
            layers=config.num_hidden_layers,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            slots=slots,
            capacity=capacity,
            taps=self.hidden_size * (len(self.tap_layers) + 1) if self.tap_layers else 0,
            dtype=dtype,
        )
        self.cache = SlotCache(shape, model.device, limit_bytes)
        self.view = InferenceView(model, dtype)
        self._captured: dict[int, torch.Tensor] = {}
        self._install_taps()

    def _install_taps(self) -> None:
        if not self.tap_layers:
            return
        layers = decoder_layers(self.view.module)
        for order, index in enumerate(self.tap_layers):
            layers[index].register_forward_pre_hook(self._capture(order), with_kwargs=True)
        head = self.view.module.get_output_embeddings()
        head.register_forward_pre_hook(self._capture(len(self.tap_layers)), with_kwargs=True)

    def _capture(self, order: int) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._captured[order] = args[0] if args else kwargs["hidden_states"]

        return hook

    @torch.no_grad()
    def prefill(self, prompt: torch.Tensor, slot: int) -> torch.Tensor:
        """Reads a prompt into a slot. prompt: int64 [P]. Returns the logits [V] after its last token."""
        positions = torch.arange(len(prompt), device=self.cache.device)[None]
        batch = ForwardBatch(slice(slot, slot + 1), positions, span=len(prompt), from_start=True)
        return self._forward(prompt[None], batch, logits_to_keep=1)[0, 0]

    @torch.no_grad()
    def decode(self, tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """Runs Q tokens of each of the first B slots. int64 [B, Q] twice → logits [B, Q, V]."""
        batch = ForwardBatch(slice(0, len(tokens)), positions.contiguous(), span=self.cache.span)
        return self._forward(tokens, batch, logits_to_keep=0)

    def _forward(self, tokens: torch.Tensor, batch: ForwardBatch, logits_to_keep: int) -> torch.Tensor:
        self.cache.begin(batch)
        out = self.view.module(
            input_ids=tokens,
            position_ids=batch.positions,
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=logits_to_keep,
            forward_batch=batch,
        )
        if self.tap_layers:
            self._store_taps(batch)
        return out.logits

    def _store_taps(self, batch: ForwardBatch) -> None:
        taps = [self._captured.pop(i) for i in range(len(self.tap_layers) + 1)]
        if taps[-1].shape[1] < taps[0].shape[1]:  # a prefill computes the head's input at the last position alone
            missing = taps[0].shape[1] - taps[-1].shape[1]
            taps[-1] = nn.functional.pad(taps[-1], (0, 0, missing, 0))
        self.cache.write_taps(batch, torch.cat(taps, dim=-1))

    def refresh_weights(self) -> None:
        """Makes the next forward use the trainer's present parameters."""
        self.view.refresh()
