"""Whole drafts in one captured graph each, for every strategy and batch bucket."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from paceline.rollout.drafters.draft_rows import DraftRows
from paceline.rollout.drafters.eagle3_expander import Eagle3Expander, ParallelExpander
from paceline.rollout.drafters.eagle3_native import NativeNetwork, read_rows
from paceline.rollout.drafters.model_drafts import DraftRules
from paceline.rollout.graphs.captures import Captures
from paceline.rollout.graphs.graph_plan import NODE_BYTES, ModelShape, powers_of_two, smallest_bucket
from paceline.rollout.graphs.graph_pool import Capturer
from paceline.rollout.model.memory_plan import WORKSPACE_BYTES, ragged_graphs
from paceline.rollout.sequence import SequenceState
from paceline.rollout.strategy.strategy import Strategy
from paceline.rollout.trees import DraftTree
from paceline.rollout.trees.expander import Expander

PARALLEL_POSITIONS = 8  # most levels of a draft in one pass that a graph holds
# kernels of a draft with one level, and of each level more, for chains and trees
_CHAIN_KERNELS, _TREE_KERNELS = (11, 33), (18, 47)


def drafter_graph_bytes(
    sizes: ModelShape, strategies: Iterable[Strategy], slots: int, parallel: bool = False
) -> int:
    """Returns the bytes of an EAGLE-3 drafter's captured graphs: whole drafts, single steps, and reading.

    Args:
        sizes: Sizes of the drafter's network.
        strategies: Strategies of the drafter; several of one shape share their graphs.
        slots: Number of sequences decoded together.
        parallel: Whether its weights can draft in one pass.
    """
    kernels = 0
    for shape in {_shape(strategy) for strategy in strategies}:
        first, more = _CHAIN_KERNELS if shape.width == 1 else _TREE_KERNELS
        kernels += first + (shape.depth - 1) * more
    drafts = kernels * len(powers_of_two(slots)) * NODE_BYTES
    logits = PARALLEL_POSITIONS * slots * sizes.vocab * sizes.bytes_per_value if parallel else 0
    pools = (4 * slots, read_rows(slots, parallel))
    graphs = sum(ragged_graphs(sizes, "draft", rows, 0).total_bytes for rows in pools)
    return drafts + logits + graphs + WORKSPACE_BYTES


def _shape(strategy: Strategy) -> Strategy:
    """Returns the strategy of the drafter whose graphs it shares: the composite drafter asks eagle3, too."""
    return replace(strategy, drafter="parallel" if strategy.drafter == "parallel" else "eagle3")


@dataclass(slots=True)
class _Captured:
    """Holds the input of a captured draft, its replay, and the draft that the replay writes."""

    rows: DraftRows
    replay: Callable[[], None]
    draft: DraftTree


class DraftGraphs:
    """Drafts by graphs that hold the network's steps and the choice of tokens between them.

    A step of the network is twenty kernels, and choosing its tokens takes as many. Launched one by one they
    cost the host several times what the GPU needs, and at small batches more than the target's forward.

    Args:
        network: The draft network.
        rules: How drafts are made.
        vocabulary: Target ids of the drafter's tokens, int64 [W]; it stays in place.
        slots: Number of sequences decoded together.
        capturer: Capturer to use.
        parallel: Whether drafts are made in one pass. Reading is that pass, so graphs only choose tokens.
    """

    def __init__(
        self,
        network: NativeNetwork,
        rules: DraftRules,
        vocabulary: torch.Tensor,
        slots: int,
        capturer: Capturer,
        parallel: bool = False,
    ) -> None:
        self._network, self._rules, self._vocabulary, self._capturer = network, rules, vocabulary, capturer
        self._batches, self._parallel = powers_of_two(slots), parallel
        options: dict[str, Any] = {"dtype": network.dtype, "device": network.device}
        self._hidden = torch.zeros(slots, 1, network.hidden_size, **options)
        positions = PARALLEL_POSITIONS if parallel else 1
        self._logits = torch.zeros(slots, positions, len(vocabulary), **options)
        self.captures: Captures[tuple[Strategy, int], _Captured] = Captures(self._capture)

    def capture(self, strategy: Strategy) -> None:
        """Captures the drafts of a strategy for every batch bucket, the largest first."""
        if self._parallel and strategy.depth > PARALLEL_POSITIONS:
            return
        for batch in reversed(self._batches):
            self.captures.get((_shape(strategy), batch))

    def draft(
        self,
        strategy: Strategy,
        newest: tuple[torch.Tensor, torch.Tensor],
        sequences: Sequence[SequenceState],
        shift: Sequence[int],
    ) -> DraftTree | None:
        """Replays the graph of a draft.

        Args:
            strategy: Size of the draft.
            newest: What reading has returned, see `Network.read`.
            sequences: Active sequences.
            shift: Position in the text of place 0 of each slot.

        Returns:
            The draft, whose ``probs`` are valid until the next one, or None if capturing failed or the
            draft is too deep.
        """
        batch, positions = newest[1].shape[:2]
        if positions > self._logits.shape[1]:
            return None
        bucket = smallest_bucket(batch, self._batches)
        assert bucket is not None, "there are more sequences than slots"
        self.captures.follow(self._network.addresses)
        captured = self.captures.get((_shape(strategy), bucket))
        if captured is None:
            return None
        self._hidden[:batch].copy_(newest[0][:, :1])
        self._logits[:batch, :positions].copy_(newest[1])
        rows = DraftRows.of(sequences, self._network.device, shift, (bucket, self._network.padding_slot))
        captured.rows.table.copy_(rows.table)
        captured.replay()
        return _first(captured.draft, batch)

    @torch.no_grad()
    def _capture(self, key: tuple[Strategy, int]) -> _Captured:
        strategy, batch = key
        device = self._network.device
        rows = DraftRows.of((), device, padding=(batch, self._network.padding_slot))
        step = functools.partial(self._network.step_in_graph, rows=rows)
        hidden, logits = self._hidden[:batch], self._logits[:batch, : strategy.depth]
        drafts: list[DraftTree] = []

        def grow() -> None:
            expander: Expander
            if self._parallel:
                expander = ParallelExpander(logits, rows, self._vocabulary)
            else:
                expander = Eagle3Expander(step, (hidden, logits), rows, self._vocabulary)
            drafts.append(self._rules.grow(expander, strategy, rows))

        replay = self._capturer.capture(grow)
        return _Captured(rows, replay, drafts[-1])


def _first(draft: DraftTree, batch: int) -> DraftTree:
    """Returns the first rows of a draft, tokens and parents in memory of their own."""
    return replace(
        draft,
        tokens=draft.tokens[:batch].clone(),
        lengths=draft.lengths[:batch],
        parents=None if draft.parents is None else draft.parents[:batch].clone(),
        probs=None if draft.probs is None else draft.probs[:batch],
    )
