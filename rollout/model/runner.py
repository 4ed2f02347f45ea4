"""Forwards of the target: prefill, and decode or verify, with taps on the hidden states."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from paceline.rollout.api import DistillationTrace
from paceline.rollout.model.attention import ForwardBatch, chain_seats, tree_seats
from paceline.rollout.model.fusion_check import decoder_layers
from paceline.rollout.model.graph_plan import GraphPlan, ModelShape, plan_graphs, plan_keys, powers_of_two
from paceline.rollout.model.graph_pool import Capturer, GraphPool
from paceline.rollout.model.kv_cache import CacheShape, SlotCache
from paceline.rollout.model.shape import intermediate_size, observed_keys
from paceline.rollout.model.text_limits import has_position_table, text_limit
from paceline.rollout.model.view_check import checked_view
from paceline.rollout.native import RaggedTokens
from paceline.rollout.sequence import SequenceState
from paceline.rollout.transformers_api import hidden_states_in, run_causal_lm
from paceline.rollout.trees import tree_shape

# sequences × tokens that are captured: past it a forward is compute-bound, and no speculation pays
MOST_ROWS = 256


def default_tap_layers(num_layers: int) -> tuple[int, int, int]:
    """EAGLE-3's low, middle and high features as vLLM numbers them: the inputs of layers 2, L // 2 and L −
    3.
    """
    low, middle, high = sorted((min(2, num_layers - 1), num_layers // 2, max(num_layers - 3, 0)))
    return low, middle, high


@dataclass(frozen=True, slots=True)
class Chunk:
    """Consecutive known tokens that one forward reads.

    Attributes:
        slot: Where to.
        tokens: The tokens.
        start: Position of the first one.
        head_from: Position from which on the output head's inputs are kept among the taps; the last token's
            always is.
    """

    slot: int
    tokens: Sequence[int]
    start: int
    head_from: int

    @property
    def heads(self) -> range:
        """Which of the tokens the output head reads."""
        return range(min(max(self.head_from - self.start, 0), len(self.tokens) - 1), len(self.tokens))


class ModelRunner:
    """Runs the policy over a `SlotCache`.

    Args:
        model: The trainer's unwrapped causal LM.
        dtype: What to compute in; parameters are shared where this is their dtype.
        slots: Sequences decoded together.
        capacity: Tokens a slot holds.
        tap_layers: Layers whose *inputs* are kept for every token; empty keeps nothing.
        limit_bytes: Memory allowed for the cache; None for what is free.

    Attributes:
        limit: The longest text that the model computes exactly, or None.

    Raises:
        ValueError: for a model that the engine cannot run.
        MemoryError: when the cache cannot hold one sequence.
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
        keys = observed_keys(model)
        config = model.config.get_text_config()
        self.hidden_size: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.tap_layers = tuple(tap_layers)
        self.limit = text_limit(model)
        self._last_position = (
            self.limit.tokens - 1 if self.limit is not None and has_position_table(model) else None
        )
        shape = CacheShape(
            layers=keys.layers,
            kv_heads=keys.kv_heads,
            head_dim=keys.head_dim,
            slots=slots,
            capacity=capacity,
            taps=self.hidden_size * (len(self.tap_layers) + 1) if self.tap_layers else 0,
            dtype=dtype,
        )
        self.cache = SlotCache(shape, model.device, limit_bytes)
        self.view = checked_view(model, dtype, shape)
        self.graphs: GraphPool | None = None
        self.shape = ModelShape(
            layers=shape.layers,
            hidden=config.hidden_size,
            intermediate=intermediate_size(config),
            heads=config.num_attention_heads,
            kv_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            vocab=config.vocab_size,
            bytes_per_value=dtype.itemsize,
        )
        self._ragged = self.view.takes_ragged
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
            self._captured[order] = hidden_states_in(args, kwargs)

        return hook

    def capture_graphs(self, max_tokens: int, capturer: Capturer, precapture: bool = True) -> GraphPool:
        """Decodes through captured graphs from now on.

        Args:
            max_tokens: Most tokens of one sequence in a forward.
            capturer: How to capture.
            precapture: Capture the plan now; otherwise each graph when it is first wanted.
        """
        plan = self.plan_graphs(max_tokens)
        self.graphs = GraphPool(
            lambda tokens, seats, _, span: (self.decode_rectangle(tokens, seats, span), None),
            plan,
            vocab=self.vocab_size,
            dtype=self.view.dtype,
            device=self.cache.device,
            capturer=capturer,
        )
        if precapture:
            self.graphs.capture_planned()
        return self.graphs

    def plan_graphs(self, max_tokens: int) -> GraphPlan:
        """What would be captured for decoding at the cache's present span, and its bytes."""
        batches = powers_of_two(self.cache.slots_at(self.cache.span))
        widths = powers_of_two(1 << (max_tokens - 1).bit_length())
        return plan_graphs(self.shape, plan_keys("target", batches, widths, (self.cache.span,), MOST_ROWS))

    def decode_rectangle(self, tokens: torch.Tensor, seats: torch.Tensor, span: int) -> torch.Tensor:
        """Logits [B, Q, V] of tokens int64 [B, Q] at seats int64 [4, B, Q] of the first B slots: what a graph
        captures.
        """
        return self._forward(tokens, ForwardBatch(slice(0, len(tokens)), seats, span=span))

    @torch.no_grad()
    def prefill(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Reads (pieces of) known tokens into their slots. Returns the logits [len(chunks), V] after the last
        token of each.
        """
        if not self._ragged:
            return torch.cat([self._prefill_alone(chunk) for chunk in chunks])
        tokens = torch.tensor([t for chunk in chunks for t in chunk.tokens])
        ragged = RaggedTokens(
            [c.slot for c in chunks], [c.start for c in chunks], [len(c.tokens) for c in chunks]
        )
        first = ragged.offsets[:-1].tolist()
        keep = torch.tensor([at + i for at, chunk in zip(first, chunks, strict=True) for i in chunk.heads])
        last = torch.tensor([len(chunk.heads) for chunk in chunks]).cumsum(0) - 1
        return self._forward(tokens[None], self._ragged_batch(ragged), keep)[0, last]

    @torch.no_grad()
    def prompt_states(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Reads prompts into the first slots, which must be free and hold them, and forgets them again.

        Returns:
            float32 [len(prompts), hidden], what the output head reads after each one's last token.
        """
        # one forward reads all prompts where tokens go without padding, else one each
        read: list[torch.Tensor] = []
        head = self.view.module.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda module, args: read.append(args[0][0]))
        try:
            self.prefill([Chunk(slot, prompt, 0, len(prompt) - 1) for slot, prompt in enumerate(prompts)])
        finally:
            hook.remove()
        return torch.cat(read).float().cpu()

    def _prefill_alone(self, chunk: Chunk) -> torch.Tensor:
        device, end = self.cache.device, chunk.start + len(chunk.tokens)
        positions = torch.arange(chunk.start, end, device=device)[None]
        rows = slice(chunk.slot, chunk.slot + 1)
        batch = ForwardBatch(rows, chain_seats(positions), span=end, from_start=chunk.start == 0)
        keep = torch.tensor(list(chunk.heads), device=device)
        return self._forward(torch.tensor([list(chunk.tokens)], device=device), batch, keep)[0, -1:]

    @torch.no_grad()
    def decode(
        self,
        tokens: torch.Tensor,
        counts: Sequence[int],
        starts: Sequence[int],
        parents: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Runs the first ``counts[b]`` of the Q tokens of each of the first B slots.

        Args:
            tokens: int64 [B, Q].
            counts: Tokens of each row that count.
            starts: Position of each row's first token.
            parents: int64 [B, Q - 1], where the tokens after the first are the nodes of a draft tree; None
                for a chain.

        Returns:
            Logits [R, V], R the sum of ``counts``, row after row.
        """
        width = tokens.shape[1]
        real = None if min(counts) == width else torch.arange(width) < torch.tensor(counts)[:, None]
        shape = None if parents is None else tree_shape(parents)
        if self._ragged:
            flat = tokens.flatten() if real is None else tokens[real]
            return self._forward(flat[None], self._ragged_batch(_ragged_tokens(counts, starts, shape, real)))[
                0
            ]
        device, span = self.cache.device, self.cache.span
        first = torch.tensor(starts).to(device, non_blocking=True)
        chain = first[:, None] + torch.arange(width, device=device)
        seats = chain_seats(chain) if shape is None else tree_seats(first, *shape)
        replayed = None if self.graphs is None else self.graphs.run(tokens, seats, span, self.cache.slots)
        logits = self.decode_rectangle(tokens, seats, span) if replayed is None else replayed[0]
        if real is None:
            return logits.flatten(0, 1)
        rows = real.flatten().nonzero()[:, 0].to(device, non_blocking=True)
        return logits.flatten(0, 1).index_select(0, rows)

    @torch.no_grad()
    def branch(self, tokens: torch.Tensor, seats: torch.Tensor) -> torch.Tensor:
        """Logits [B, E, V] of E more nodes of a draft tree in each of the first B slots, for drafting: taps
        stay as they are.

        Args:
            tokens: int64 [B, E].
            seats: int64 [4, B, E], as in `ForwardBatch`; adjacent places a row.
        """
        if not self._ragged:
            batch = ForwardBatch(slice(0, len(tokens)), seats, span=self.cache.span)
            return self._forward(tokens, batch, store_taps=False)
        batch = self._ragged_batch(RaggedTokens.from_seats(seats))
        return self._forward(tokens.reshape(1, -1), batch, store_taps=False).view(*tokens.shape, -1)

    @contextmanager
    def layers_replaced(self, replaced: Mapping[int, Callable[[nn.Module], nn.Module]]) -> Iterator[None]:
        """Runs other modules in place of some decoder layers; what they take and give is what transformers'
        layers do.

        Args:
            replaced: Index of a layer → its replacement, made from it.
        """
        layers = decoder_layers(self.view.module)
        originals = {index: layers[index] for index in replaced}
        try:
            for index, make in replaced.items():
                layers[index] = make(originals[index])
            yield
        finally:
            for index, layer in originals.items():
                layers[index] = layer

    def _ragged_batch(self, ragged: RaggedTokens) -> ForwardBatch:
        return ForwardBatch(slice(0, 0), ragged.seats, span=self.cache.span, ragged=ragged)

    def _forward(
        self,
        tokens: torch.Tensor,
        batch: ForwardBatch,
        keep: torch.Tensor | None = None,
        store_taps: bool = True,
    ) -> torch.Tensor:
        """Logits [B, Q, V], or [B, len(keep), V] for the tokens named."""
        self.cache.begin(batch)
        positions = batch.positions
        # padding, and drafts past the end of a text, have none in the table
        if self._last_position is not None:
            positions = positions.clamp(max=self._last_position)
        logits = run_causal_lm(
            self.view.module, tokens, positions, self.cache, 0 if keep is None else keep, forward_batch=batch
        )
        if self.tap_layers and store_taps:
            self._store_taps(batch, keep)
        self._captured.clear()
        return logits

    def _store_taps(self, batch: ForwardBatch, keep: torch.Tensor | None) -> None:
        taps = [self._captured.pop(i) for i in range(len(self.tap_layers) + 1)]
        if keep is not None:  # the head's input is there for the tokens whose logits were wanted
            head_input = torch.zeros_like(taps[0])
            head_input[:, keep] = taps[-1]
            taps[-1] = head_input
        self.cache.write_taps(batch, torch.cat(taps, dim=-1))

    def trace(self, sequence: SequenceState, slot: int) -> DistillationTrace:
        """A copy of what the forwards saw of the sequence in ``slot``."""
        features = self.cache.taps[slot, : len(sequence.tokens) - 1]
        taps, final = features.split([features.shape[-1] - self.hidden_size, self.hidden_size], dim=-1)
        final = final.clone()
        final[: sequence.num_prompt - 1] = 0  # an earlier turn's, where its keys were kept
        # a stop may have cut the rest
        rejections = [r for r in sequence.rejections if r.position < len(sequence.tokens)]
        return DistillationTrace(
            torch.tensor(sequence.tokens),
            sequence.num_prompt,
            taps.clone(),
            final,
            torch.tensor([[r.position, r.token] for r in rejections], dtype=torch.long).view(-1, 2),
            torch.stack([r.final for r in rejections]) if rejections else final[:0].clone(),
        )

    def refresh_weights(self) -> None:
        """Makes the next forward use the trainer's present parameters."""
        self.view.refresh()


def _ragged_tokens(
    counts: Sequence[int],
    starts: Sequence[int],
    shape: tuple[torch.Tensor, torch.Tensor] | None,
    real: torch.Tensor | None,
) -> RaggedTokens:
    if shape is None:
        return RaggedTokens(range(len(counts)), starts, counts)
    depth, ancestors = (torch.nn.functional.pad(x, (1, 0)) for x in shape)
    trunks = (torch.tensor(starts)[:, None] + 1).expand_as(depth)
    nodes = [x.flatten() if real is None else x[real] for x in (trunks, depth, ancestors)]
    return RaggedTokens(
        range(len(counts)), starts, counts, nodes=tuple(np.ascontiguousarray(x.numpy()) for x in nodes)
    )
