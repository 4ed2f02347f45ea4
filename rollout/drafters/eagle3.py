"""Drafting with the EAGLE-3 model, over its own one-layer slot cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from paceline.rollout.drafters.base import DraftContext, TapReader, VerifiedStep, has_caught_up
from paceline.rollout.drafters.draft_graphs import DraftGraphs
from paceline.rollout.drafters.draft_network import Reading
from paceline.rollout.drafters.draft_rows import DraftRows
from paceline.rollout.drafters.eagle3_expander import Eagle3Expander, ParallelExpander
from paceline.rollout.drafters.eagle3_model import SINKS, Eagle3Model, attention_shape
from paceline.rollout.drafters.eagle3_native import NativeNetwork
from paceline.rollout.drafters.eagle3_network import network_for
from paceline.rollout.drafters.model_drafts import DraftRules
from paceline.rollout.drafters.parts import DrafterHost, DrafterParts
from paceline.rollout.graphs.graph_pool import CudaCapturer
from paceline.rollout.model.kv_cache import CacheShape
from paceline.rollout.model.paged_cache import PagedCache
from paceline.rollout.model.runner import ModelRunner
from paceline.rollout.sequence import SequenceState
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import MAX_NODES, DraftKind, DraftTree

# tokens of all sequences that are read at once
_READ_TOKENS = 1024


class Eagle3Drafter:
    """Drafts chains and trees with an `Eagle3Model`.

    The features of committed tokens are read from the engine's taps only when a draft is asked for, so that a
    batch decoded without drafts pays nothing for the drafter.

    Args:
        model: Initial weights; they are copied (and packed on a CPU in bfloat16).
        embed_tokens: The target's input embedding, shared.
        slots: Number of sequences decoded together.
        capacity: Tokens that a slot of the engine holds.
        dtype: Compute dtype.
        rules: How drafts are made; None for chains and dynamic trees of the likeliest tokens.
        window: Minimum number of tokens of a sequence that the drafter attends to; None for all. With a
            window, the cache keeps its size however long sequences grow, and reading a long prompt starts
            that many tokens before its end. The first four tokens of the text stay visible, as they are in
            training (LongSpec, arXiv 2502.17421, bounds the drafter's memory in the same way).
        taps: Reader of the engine's taps, with which a GPU captures reading in graphs; None reads outside
            them.
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
        rules: DraftRules | None = None,
        window: int | None = None,
        taps: TapReader | None = None,
    ) -> None:
        device = next(embed_tokens.parameters()).device
        self.config = config = model.config
        _, kv_heads, head_dim = attention_shape(config)
        self.rules = DraftRules() if rules is None else rules
        self.parallel_rules = replace(self.rules)  # a stop policy of their own
        with torch.device(device):
            self._weights = Eagle3Model(config, model.vocabulary).to(dtype=dtype).requires_grad_(False).eval()
        self._weights.load_state_dict(model.state_dict())
        # the window of a bounded cache moves when twice its size is full, so that each token is copied only
        # once for every token it attends to
        self._window = window
        self._room = capacity + MAX_NODES if window is None else min(2 * window + SINKS, capacity) + MAX_NODES
        shape = CacheShape(1, kv_heads, head_dim, slots, self._room, 0, dtype)
        self._network, self.cache = network_for(
            self._weights, embed_tokens, shape, device, capacity + MAX_NODES
        )
        self._seen, self._shift = [0] * slots, [0] * slots
        self.caught_up = False
        self.vocabulary = self._weights.vocabulary
        self.load_weights(model)
        self.graphs: DraftGraphs | None = None
        self._parallel_graphs: DraftGraphs | None = None
        if device.type == "cuda":
            capturer = CudaCapturer(device)
            self._network.capture_graphs(capturer, precapture=True)
            if isinstance(self._network, NativeNetwork):
                if taps is not None:
                    self._network.capture_reads(capturer, taps)
                self.graphs = DraftGraphs(self._network, self.rules, self.vocabulary, slots, capturer)
                if self.mask_token is not None:
                    self._parallel_graphs = DraftGraphs(
                        self._network, self.parallel_rules, self.vocabulary, slots, capturer, parallel=True
                    )

    @classmethod
    def build(cls, host: DrafterHost, parts: DrafterParts) -> Eagle3Drafter:
        """Builds the drafter for an engine.

        Raises:
            ValueError: The parts have no EAGLE-3 weights, or weights that are not finite.
        """
        if parts.eagle3 is None:
            raise ValueError("the eagle3 drafter has no weights: set DrafterParts.eagle3")
        return cls(
            parts.eagle3,
            host.runner.view.module.get_input_embeddings(),
            slots=host.slots,
            capacity=host.capacity,
            dtype=host.dtype,
            rules=parts.rules,
            window=parts.eagle3_window,
            taps=fixed_taps(host.runner),
        )

    @torch.no_grad()
    def load_weights(self, source: Eagle3Model) -> None:
        """Copies the weights and vocabulary of ``source``, in any float dtype; call it between rollouts.

        Raises:
            ValueError: A weight is NaN or infinite; the present weights stay in use.
        """
        not_finite = [name for name, p in source.named_parameters() if not bool(torch.isfinite(p).all())]
        if not_finite:
            raise ValueError(
                f"the drafter's {not_finite[0]} has NaN or infinite values: the last good drafter stays in "
                "use"
            )
        self._weights.load_state_dict(source.state_dict())
        self._network.refresh()
        self.vocabulary.copy_(self._weights.vocabulary)  # in place: captured graphs read it

    @staticmethod
    def drafts(strategy: Strategy, rules: DraftRules) -> DraftKind:
        """Returns the kind of drafts of the strategy's width under ``rules``, see `Drafter`."""
        return rules.kind(strategy.width)

    @property
    def mask_token(self) -> int | None:
        """The mask token of weights that can draft in one pass; None for others."""
        return self._weights.mask_token

    @torch.no_grad()
    def propose(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        """Reads the features of newly committed tokens, then drafts."""
        newest = self._read_for(context, strategy)
        sequences, shift = context.sequences, self._shift[: len(context.sequences)]
        if self.graphs is not None and self.rules.has_fixed_work(strategy):
            drafted = self.graphs.draft(strategy, newest, sequences, shift)
            if drafted is not None:
                return drafted
        if self.rules.is_likeliest_chain(strategy) and isinstance(self._network, NativeNetwork):
            places = [len(s.tokens) - 1 - moved for s, moved in zip(sequences, shift, strict=True)]
            tokens = self._network.chains(newest, places, shift, strategy.depth, self.vocabulary)
            if tokens is not None:
                return _chains(tokens)
        rows = DraftRows.of(sequences, self.cache.device, shift)
        step = functools.partial(self._network.step, shift=shift)
        return self.rules.grow(Eagle3Expander(step, newest, rows, self.vocabulary), strategy, rows)

    @torch.no_grad()
    def propose_parallel(self, context: DraftContext, strategy: Strategy) -> DraftTree:
        """Reads newly committed tokens and drafts in the same pass, see `ParallelDrafter`."""
        newest = self._read_for(context, strategy, masks=strategy.depth - 1)
        if self.parallel_rules.is_likeliest_chain(strategy):
            return _chains(self.vocabulary[newest[1].argmax(-1)])
        sequences, shift = context.sequences, self._shift[: len(context.sequences)]
        if self._parallel_graphs is not None and self.parallel_rules.has_fixed_work(strategy):
            drafted = self._parallel_graphs.draft(strategy, newest, sequences, shift)
            if drafted is not None:
                return drafted
        rows = DraftRows.of(sequences, self.cache.device, shift)
        expander = ParallelExpander(newest[1], rows, self.vocabulary)
        return self.parallel_rules.grow(expander, strategy, rows)

    def prepare(self, strategy: Strategy) -> None:
        """Captures the graphs of a strategy's drafts for every batch, see `Drafter`."""
        if self.graphs is not None and self.rules.has_fixed_work(strategy):
            self.graphs.capture(strategy)

    def prepare_parallel(self, strategy: Strategy) -> None:
        """Does what `prepare` does for drafts in one pass; chains of likeliest tokens take no graph."""
        rules, graphs = self.parallel_rules, self._parallel_graphs
        if graphs is not None and rules.has_fixed_work(strategy) and not rules.is_likeliest_chain(strategy):
            graphs.capture(strategy)

    def _read_for(
        self, context: DraftContext, strategy: Strategy, masks: int = 0
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Makes room for a draft and reads all new tokens, see `Network.read`."""
        assert context.taps is not None, "the EAGLE-3 drafter needs an engine that keeps taps"
        self._make_room(context.sequences)
        newest, read = self._read(context.sequences, context.taps, masks)
        self.caught_up = has_caught_up(read, len(context.sequences), strategy)
        return newest

    def _read(
        self, sequences: Sequence[SequenceState], taps: TapReader, masks: int
    ) -> tuple[tuple[torch.Tensor, torch.Tensor], int]:
        """Reads all new tokens, in pieces where they are many, and masks after the last piece.

        Memory is then bounded by the piece, however long a batch has decoded without drafts. A prompt is read
        for one of the sequences that share it, and copied to the others.

        Returns:
            What `Network.read` returns of the last piece, and the number of tokens read.
        """
        batch = len(sequences)
        piece = max(_READ_TOKENS // batch, 1)
        total = 0
        while True:
            waiting = self._copy_prompts(sequences)
            # a window that begins past the first tokens, none of which were read yet
            sinks = [slot for slot in range(batch) if self._shift[slot] and self._seen[slot] < SINKS]
            unread = [len(s.tokens) - 1 - at for s, at in zip(sequences, self._seen, strict=False)]
            last = not waiting and not sinks and max(unread) <= piece
            # until the last piece each sequence keeps a token to read then; it may be read twice
            read = unread if last else [min(n - 1, piece) for n in unread]
            for slot in waiting:
                read[slot] = 0
            shift = self._shift[:batch]
            for slot in sinks:
                read[slot], shift[slot] = SINKS - self._seen[slot], 0
            counts = [max(n, 1) for n in read]
            reading = Reading(sequences, self._seen[:batch], counts, shift, taps, masks if last else 0)
            newest = self._network.read(reading)
            total += sum(counts)
            self._seen[:batch] = [at + n for at, n in zip(self._seen, read, strict=False)]
            for slot in sinks:
                self._seen[slot] = self._shift[slot] + SINKS
            if last:
                return newest, total

    def _copy_prompts(self, sequences: Sequence[SequenceState]) -> list[int]:
        """Copies prompts to slots where nothing was read yet from slots that have read the same prompt.

        Returns:
            The slots whose prompt will be read in another slot first.
        """
        waiting, readers = list[int](), dict[tuple[int, ...], int]()
        if all(self._seen[: len(sequences)]):
            return waiting
        for slot in sorted(range(len(sequences)), key=lambda slot: -self._seen[slot]):
            if self._shift[slot]:
                continue
            prompt = tuple(sequences[slot].tokens[: sequences[slot].num_prompt])
            reader = readers.setdefault(prompt, slot)
            # each token is read with the features before it, and the last one that is left in the last piece
            shared = len(prompt) - 2
            if reader == slot or self._seen[slot] or shared < 1:
                continue
            if self._seen[reader] < shared:
                waiting.append(slot)
            else:
                self.cache.copy_slot(reader, [slot], shared)
                self._seen[slot] = shared
        return waiting

    def _make_room(self, sequences: Sequence[SequenceState]) -> None:
        """Moves the window of full slots, then reserves cache for the tokens to read and to draft."""
        active = len(sequences) if any(self._seen) else 0
        for slot, sequence in enumerate(sequences):
            end = len(sequence.tokens) - 1
            if self._window is not None and end - self._shift[slot] > self._room - MAX_NODES:
                self._move_window(slot, end - self._window - SINKS)
        held = (len(s.tokens) - shift for s, shift in zip(sequences, self._shift, strict=False))
        self.cache.reserve([min(length + MAX_NODES, self._room) for length in held], active=active)

    def _move_window(self, slot: int, shift: int) -> None:
        """Moves the slot's window so that the tokens after the sinks begin with position ``shift`` + 4."""
        kept = self._seen[slot] - shift - SINKS
        if kept > 0:
            start = shift - self._shift[slot] + SINKS
            lines, taps = self.cache.read_slot(slot, start + kept)
            rest = torch.cat([lines[:, :, :, :SINKS], lines[:, :, :, start:]], 3)
            self.cache.write_slot(slot, rest, torch.cat([taps[:SINKS], taps[start:]]))
        self._shift[slot] = shift
        if self._seen[slot] >= SINKS:
            self._seen[slot] = max(self._seen[slot], shift + SINKS)

    def verified(self, step: VerifiedStep) -> None:
        """Passes verifications of this drafter's drafts on to the stop policy."""
        if step.strategy.drafter == self.name:
            self.rules.learn(step)

    def observe(self, sequence: SequenceState, count: int) -> None:
        """Does nothing: features are read from the taps when the next draft is asked for."""

    def move(self, source: int, target: int) -> None:
        """Moves the cache of slot ``source`` to slot ``target``."""
        self.cache.vacate(target, source, self._seen[source] - self._shift[source])
        self._seen[target], self._shift[target] = self._seen[source], self._shift[source]

    def release(self, slot: int) -> None:
        """Clears the slot."""
        if self._seen[slot]:
            self._seen[slot] = self._shift[slot] = 0
            self.cache.clear_slot(slot)

    def forget(self, sequence: SequenceState) -> None:
        """Does nothing: state is kept by slot, not by sequence."""


def _chains(tokens: torch.Tensor) -> DraftTree:
    """Returns drafts of whole chains of likeliest tokens, int64 [B, depth]."""
    return DraftTree(tokens, torch.full((len(tokens),), tokens.shape[1]), kind=DraftKind.FIXED)


def fixed_taps(runner: ModelRunner) -> TapReader | None:
    """Returns the reader of a runner's taps if they never move, which pages do not and rectangles do."""
    return runner.cache.taps_at if runner.tap_layers and isinstance(runner.cache, PagedCache) else None
