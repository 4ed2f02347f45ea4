"""Forwards of the target model: prefill, decode and verification, with taps on the hidden states."""

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
from paceline.rollout.graphs.graph_plan import MOST_ROWS, GraphPlan, plan_graphs, plan_keys, powers_of_two
from paceline.rollout.graphs.graph_pool import Capturer, GraphPool, seat_padding
from paceline.rollout.model.attention import ForwardBatch, chain_seats, tree_seats
from paceline.rollout.model.fusion_check import decoder_layers
from paceline.rollout.model.kv_cache import CacheShape, SlotCache, cache_tokens
from paceline.rollout.model.memory_plan import MemoryPlan, engine_plan, model_shape, ragged_graphs
from paceline.rollout.model.paged_cache import PagedCache
from paceline.rollout.model.shape import observed_keys
from paceline.rollout.model.view_check import checked_view
from paceline.rollout.native import DeviceTokens, RaggedTokens, upload
from paceline.rollout.sequence import SequenceState
from paceline.rollout.text_limits import has_position_table, text_limit
from paceline.rollout.transformers_api import hidden_states_in, run_causal_lm
from paceline.rollout.trees import tree_shape


def default_tap_layers(num_layers: int) -> tuple[int, int, int]:
    """Returns EAGLE-3's low, middle and high tap layers as vLLM numbers them.

    They are the inputs of layers 2, L // 2 and L − 3.
    """
    low, middle, high = sorted((min(2, num_layers - 1), num_layers // 2, max(num_layers - 3, 0)))
    return low, middle, high


@dataclass(frozen=True, slots=True)
class Chunk:
    """Describes consecutive known tokens that one forward reads.

    Attributes:
        slot: Slot that the tokens are read into.
        tokens: Token ids.
        start: Position of the first token.
        head_from: Position from which on the output head's inputs are kept among the taps; that of the last
            token is always kept.
    """

    slot: int
    tokens: Sequence[int]
    start: int
    head_from: int

    @property
    def heads(self) -> range:
        """The indices of the tokens that the output head reads."""
        return range(min(max(self.head_from - self.start, 0), len(self.tokens) - 1), len(self.tokens))


class ModelRunner:
    """Runs the policy over a `SlotCache`.

    Args:
        model: The trainer's unwrapped causal LM.
        dtype: Compute dtype. Parameters of this dtype are shared.
        slots: Maximum number of sequences decoded together.
        capacity: Number of tokens that a slot holds.
        tap_layers: Layers whose *inputs* are kept for every token; empty keeps nothing.
        limit_bytes: Memory limit of the cache; None for the free memory, of a GPU what its plan leaves.
        prefill_tokens: Maximum number of prompt tokens that one forward reads.
        others: Bytes that the trainer and drafters take of a GPU, see `engine_plan`.

    Attributes:
        limit: Longest text that the model computes exactly, or None.
        memory: Plan of the GPU's memory; None on a CPU.

    Raises:
        ValueError: The engine cannot run the model.
        MemoryError: The cache cannot hold one sequence.
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
        prefill_tokens: int = 512,
        others: Mapping[str, int] | None = None,
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
        self.shape = model_shape(config, shape)
        # too little memory is reported before anything is built
        self.memory: MemoryPlan | None = None
        if model.device.type == "cuda":
            self.memory = engine_plan(model, shape, self.shape, prefill_tokens, others, limit_bytes)
            limit_bytes = self.memory.cache if limit_bytes is None else limit_bytes
        cache_tokens(shape, model.device, limit_bytes)
        self.view = checked_view(model, dtype, shape)
        self.kernels = self.view.kernels
        paged = self.kernels is not None and self.kernels.paged
        self.cache: SlotCache | PagedCache = (PagedCache if paged else SlotCache)(
            shape, model.device, limit_bytes
        )
        self.graphs: GraphPool | None = None
        self._captured: dict[int, torch.Tensor] = {}
        self._install_taps()

    def _install_taps(self) -> None:
        """Hooks the tapped layers and the output head, to capture their inputs."""
        if not self.tap_layers:
            return
        layers = decoder_layers(self.view.module)
        for order, index in enumerate(self.tap_layers):
            layers[index].register_forward_pre_hook(self._capture(order), with_kwargs=True)
        head = self.view.module.get_output_embeddings()
        head.register_forward_pre_hook(self._capture(len(self.tap_layers)), with_kwargs=True)

    def _capture(self, order: int) -> Any:
        """Returns a hook that stores a module's hidden-state input as tap number ``order``."""

        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self._captured[order] = hidden_states_in(args, kwargs)

        return hook

    def capture_graphs(self, max_tokens: int, capturer: Capturer, precapture: bool = True) -> GraphPool:
        """Makes the runner decode through captured graphs from now on.

        Args:
            max_tokens: Maximum number of tokens per sequence in a forward.
            capturer: Capturer to use.
            precapture: Whether to capture the plan now; otherwise each graph is captured when first needed.
        """
        plan = self.plan_graphs(max_tokens)
        decode = self.decode_rectangle if self.kernels is None else self._decode_described
        self.graphs = GraphPool(
            lambda tokens, seats, _, span: (decode(tokens, seats, span), None),
            plan,
            vocab=self.vocab_size,
            dtype=self.view.dtype,
            device=self.cache.device,
            capturer=capturer,
            padding=seat_padding if isinstance(self.cache, SlotCache) else self.cache.padding,
        )
        self.graphs.follow(self.view.addresses())
        if precapture:
            self.graphs.capture_planned()
        return self.graphs

    def plan_graphs(self, max_tokens: int) -> GraphPlan:
        """Returns the graphs to capture for decoding at the cache's current span, with their bytes."""
        if self.kernels is not None:
            rows = max(MOST_ROWS, self.cache.shape.slots)
            return ragged_graphs(self.shape, "target", rows, self.cache.span)
        batches = powers_of_two(self.cache.slots_at(self.cache.span))
        widths = powers_of_two(max_tokens)
        return plan_graphs(self.shape, plan_keys("target", batches, widths, (self.cache.span,), MOST_ROWS))

    def most_tokens(self, batch: int) -> int | None:
        """Returns how many tokens of each of ``batch`` sequences a captured forward holds.

        Without captured forwards it is None.
        """
        if self.graphs is None:
            return None
        if self.kernels is not None:
            return max(self.graphs.rows // batch, 1)
        return self.graphs.most_tokens(batch, self.cache.span, self.cache.slots)

    def decode_rectangle(self, tokens: torch.Tensor, seats: torch.Tensor, span: int) -> torch.Tensor:
        """Runs a padded batch over the first B slots; this is the forward that graphs capture.

        Args:
            tokens: Token ids, int64 [B, Q].
            seats: Seats as in `ForwardBatch`, int64 [4, B, Q].
            span: Number of keys that attention reads.

        Returns:
            Logits [B, Q, V].
        """
        return self._forward(tokens, ForwardBatch(slice(0, len(tokens)), seats, span=span))

    @torch.no_grad()
    def prefill(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        """Reads (pieces of) known tokens into their slots.

        Returns:
            Logits after the last token of each chunk, [len(chunks), V].
        """
        if self.kernels is None:
            return torch.cat([self._prefill_alone(chunk) for chunk in chunks])
        device = self.cache.device
        tokens = upload([t for chunk in chunks for t in chunk.tokens], device)
        ragged = RaggedTokens(
            [c.slot for c in chunks], [c.start for c in chunks], [len(c.tokens) for c in chunks]
        )
        first = ragged.offsets[:-1].tolist()
        keep = upload([at + i for at, chunk in zip(first, chunks, strict=True) for i in chunk.heads], device)
        last = upload(torch.tensor([len(chunk.heads) for chunk in chunks]).cumsum(0) - 1, device)
        return self._forward(tokens[None], self._ragged_batch(ragged), keep)[0, last]

    @torch.no_grad()
    def prompt_states(self, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
        """Reads prompts into the first slots, which must be free and large enough, and forgets them again.

        Returns:
            Input of the output head after each prompt's last token, float32 [len(prompts), hidden].
        """
        # the hook runs once for all prompts without padding, else once per prompt
        states: list[torch.Tensor] = []
        head = self.view.module.get_output_embeddings()
        hook = head.register_forward_pre_hook(lambda module, args: states.append(args[0][0]))
        try:
            self.prefill([Chunk(slot, prompt, 0, len(prompt) - 1) for slot, prompt in enumerate(prompts)])
        finally:
            hook.remove()
        return torch.cat(states).float().cpu()

    def _prefill_alone(self, chunk: Chunk) -> torch.Tensor:
        """Reads one chunk in a forward of its own; returns the logits [1, V] after its last token."""
        device, end = self.cache.device, chunk.start + len(chunk.tokens)
        positions = torch.arange(chunk.start, end, device=device)[None]
        rows = slice(chunk.slot, chunk.slot + 1)
        batch = ForwardBatch(rows, chain_seats(positions), span=end, from_start=chunk.start == 0)
        keep = torch.arange(chunk.heads.start, chunk.heads.stop, device=device)
        return self._forward(upload([list(chunk.tokens)], device), batch, keep)[0, -1:]

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
            tokens: Token ids, int64 [B, Q].
            counts: Number of valid tokens in each row.
            starts: Position of each row's first token.
            parents: Parents of the nodes if the tokens after the first form a draft tree, int64 [B, Q - 1];
                None for a chain.

        Returns:
            Logits [R, V], row after row, where R is the sum of ``counts``.
        """
        width = tokens.shape[1]
        real = None if min(counts) == width else torch.arange(width) < torch.tensor(counts)[:, None]
        shape = None if parents is None else tree_shape(parents.cpu())
        device, span = self.cache.device, self.cache.span
        if self.kernels is not None:
            flat = tokens.flatten()
            if real is not None:
                flat = flat.index_select(0, upload(real.flatten().nonzero()[:, 0], flat.device))
            return self._decode_ragged(flat, _ragged_tokens(counts, starts, shape, real))
        first = upload(starts, device)
        chain = first[:, None] + torch.arange(width, device=device)
        seats = (
            chain_seats(chain) if shape is None else tree_seats(first, *upload(torch.stack(shape), device))
        )
        replayed = None if self.graphs is None else self.graphs.run(tokens, seats, span, self.cache.slots)
        logits = self.decode_rectangle(tokens, seats, span) if replayed is None else replayed[0]
        if real is None:
            return logits.flatten(0, 1)
        rows = upload(real.flatten().nonzero()[:, 0], device)
        return logits.flatten(0, 1).index_select(0, rows)

    def _decode_ragged(self, tokens: torch.Tensor, ragged: RaggedTokens) -> torch.Tensor:
        """Runs tokens int64 [N], by a captured graph where one fits; returns logits [N, V]."""
        batch = self._ragged_batch(ragged)
        if self.graphs is not None and isinstance(batch.ragged, DeviceTokens):
            table, span = batch.ragged.table[:, None], self.cache.span
            replayed = self.graphs.run(tokens[None], table, span, self.cache.slots)
            if replayed is not None:
                return replayed[0][0]
        return self._forward(tokens[None], batch)[0]

    def _decode_described(self, tokens: torch.Tensor, table: torch.Tensor, span: int) -> torch.Tensor:
        """Runs tokens [1, N] described by a `DeviceTokens` table [6, 1, N]; graphs capture this forward."""
        described = DeviceTokens(table[:, 0])
        return self._forward(tokens, ForwardBatch(slice(0, 0), described.seats, span=span, ragged=described))

    @torch.no_grad()
    def branch(self, tokens: torch.Tensor, seats: torch.Tensor) -> torch.Tensor:
        """Runs E more nodes of a draft tree in each of the first B slots, for drafting, without taps.

        Args:
            tokens: Token ids, int64 [B, E].
            seats: Seats as in `ForwardBatch`, int64 [4, B, E]; the places of a row are adjacent.

        Returns:
            Logits [B, E, V].
        """
        if self.kernels is None:
            batch = ForwardBatch(slice(0, len(tokens)), seats, span=self.cache.span)
            return self._forward(tokens, batch, store_taps=False)
        described = self.kernels.describe_seats(seats)
        batch = ForwardBatch(slice(0, 0), described.seats, span=self.cache.span, ragged=described)
        return self._forward(tokens.reshape(1, -1), batch, store_taps=False).view(*tokens.shape, -1)

    @contextmanager
    def layers_replaced(self, replaced: Mapping[int, Callable[[nn.Module], nn.Module]]) -> Iterator[None]:
        """Runs other modules in place of some decoder layers, within a context.

        The replacements take and return what transformers' layers do.

        Args:
            replaced: Index of a layer → function that makes its replacement from it.
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
        """Returns the batch of tokens without padding."""
        assert self.kernels is not None
        described = self.kernels.describe(ragged, self.cache.device)
        return ForwardBatch(slice(0, 0), described.seats, span=self.cache.span, ragged=described)

    def _forward(
        self,
        tokens: torch.Tensor,
        batch: ForwardBatch,
        keep: torch.Tensor | None = None,
        store_taps: bool = True,
    ) -> torch.Tensor:
        """Returns logits [B, Q, V], or [B, len(keep), V] for the tokens in ``keep``."""
        self.cache.begin(batch)
        positions = batch.positions
        # padding and drafts past the end of a text have no entry in the position table
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
        """Stores the captured hidden states of the batch's tokens in the cache."""
        taps = [self._captured.pop(i) for i in range(len(self.tap_layers) + 1)]
        if keep is not None:  # the head read only the tokens whose logits were requested
            head_input = torch.zeros_like(taps[0])
            head_input[:, keep] = taps[-1]
            taps[-1] = head_input
        self.cache.write_taps(batch, torch.cat(taps, dim=-1))

    def trace(self, sequence: SequenceState, slot: int) -> DistillationTrace:
        """Returns a CPU copy of the hidden states that the forwards saw of the sequence in ``slot``."""
        places = torch.arange(len(sequence.tokens) - 1, device=self.cache.device)
        features = self.cache.taps_at(torch.full_like(places, slot), places).cpu()
        taps, final = features.split([features.shape[-1] - self.hidden_size, self.hidden_size], dim=-1)
        taps, final = taps.contiguous(), final.contiguous()
        final[: sequence.num_prompt - 1] = 0  # a restored prefix may hold an earlier turn's values
        # a stop may have cut the text before later rejections
        rejections = [r for r in sequence.rejections if r.position < len(sequence.tokens)]
        return DistillationTrace(
            torch.tensor(sequence.tokens),
            sequence.num_prompt,
            taps,
            final,
            torch.tensor([[r.position, r.token] for r in rejections], dtype=torch.long).view(-1, 2),
            torch.stack([r.final for r in rejections]).cpu() if rejections else final[:0].clone(),
        )

    def refresh_weights(self) -> None:
        """Makes the next forward use the trainer's current parameters."""
        self.view.refresh()
        if self.graphs is not None:
            self.graphs.follow(self.view.addresses())


def _ragged_tokens(
    counts: Sequence[int],
    starts: Sequence[int],
    shape: tuple[torch.Tensor, torch.Tensor] | None,
    real: torch.Tensor | None,
) -> RaggedTokens:
    """Returns the valid tokens of a chain or tree batch without padding."""
    if shape is None:
        return RaggedTokens(range(len(counts)), starts, counts)
    depth, ancestors = (torch.nn.functional.pad(x, (1, 0)) for x in shape)
    trunks = (torch.tensor(starts)[:, None] + 1).expand_as(depth)
    nodes = [x.flatten() if real is None else x[real] for x in (trunks, depth, ancestors)]
    return RaggedTokens(
        range(len(counts)), starts, counts, nodes=tuple(np.ascontiguousarray(x.numpy()) for x in nodes)
    )
