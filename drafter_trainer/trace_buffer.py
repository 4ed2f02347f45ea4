"""Traces of recent rollouts, and the order in which the drafter is trained on them."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from paceline.drafter_trainer.storage.stored_trace import StoredTrace
from paceline.drafter_trainer.teacher import Normalizers
from paceline.rollout.api import Rollout

_HELD_OUT_STEPS = 3  # RL steps for which a held-out group evaluates drafters
LONGEST_PIECE = 512  # so that attention without a fused kernel takes memory linear in a micro-batch


@dataclass(slots=True)
class Entry:
    """A trace in the buffer.

    Attributes:
        trace: The trace, in memory or on disk.
        weight: Loss weight.
        age: Age in RL steps.
        group: Identifier of the group of samples that it belongs to.
        normalizers: The log-sum-exp of the policy's logits at the trace's positions, as far as computed.
    """

    trace: StoredTrace
    weight: float = 1.0
    age: int = 0
    group: Hashable = None
    normalizers: Normalizers = field(init=False)

    def __post_init__(self) -> None:
        self.forget_policy()

    def forget_policy(self) -> None:
        """Drops what was computed with the policy's output head, whose weights have changed."""
        self.normalizers = Normalizers(self.trace.length - 1)


@dataclass(frozen=True, slots=True)
class Piece:
    """The anchors ``begin`` to ``end`` (exclusive) of a trace, short enough for a micro-batch.

    What comes before them in the text is their left context, see `pack`.
    """

    entry: Entry
    begin: int
    end: int


class TraceBuffer:
    """Holds the traces of the current RL step and the long ones of earlier steps.

    All traces are verified rollouts of the policy itself. Short sequences finish first, so what a rank holds
    while others still decode is biased towards them. To balance this, the buffer keeps the sequences of
    earlier steps that were at least as long as their step's median (TLT, arXiv 2511.16665, calls this
    one-step-off sampling).

    Drafters are evaluated on whole held-out groups. Samples of one prompt are so similar that a drafter which
    has memorised some of them does well on the others, and worse on the prompts of the next step.

    Args:
        memory_tokens: Tokens of traces to hold in memory, held-out ones aside. The newest traces stay there,
            and of those of one age the longest.
        disk_tokens: Tokens of traces to hold on disk beyond that; the rest is dropped.
        spill: Directory of the traces on disk; None drops what does not fit into memory.
        previous_steps: Number of steps for which long sequences are kept.
        previous_share: Share of a micro-batch that comes from earlier steps.
        age_decay: Factor on a trace's weight for each step of its age.
        held_out_every: Hold out every n-th group for three steps; 0 holds out none.
        passes: Maximum number of passes over a step's traces.
        seed: Seed of the order.
    """

    def __init__(
        self,
        *,
        memory_tokens: int = 65536,
        disk_tokens: int = 0,
        spill: Path | None = None,
        previous_steps: int = 4,
        previous_share: float = 0.5,
        age_decay: float = 0.8,
        held_out_every: int = 4,
        passes: int = 1,
        seed: int = 0,
    ) -> None:
        self.memory_tokens, self.disk_tokens = memory_tokens, disk_tokens if spill is not None else 0
        self._spill = spill
        self.previous_steps, self.previous_share, self.age_decay = previous_steps, previous_share, age_decay
        self.held_out_every, self.passes = held_out_every, passes
        self._random = random.Random(seed)
        self.current: list[Entry] = []
        self.previous: list[Entry] = []
        self.held_out: list[Entry] = []
        self._queue: list[Piece] = []
        self._older: list[Piece] = []
        self._returned: list[Piece] = []
        self._passes_left = 0
        self._written = 0

    def begin_step(self, same_policy: bool = False) -> None:
        """Starts a step: the current step's long traces join the earlier ones, and old traces are dropped.

        Args:
            same_policy: Whether the policy's weights are those of the last step.
        """
        median = statistics.median([e.trace.length for e in self.current]) if self.current else 0
        aging = [*self.previous, *(e for e in self.current if e.trace.length >= median), *self.held_out]
        for entry in aging:
            entry.age += 1
            if not same_policy:
                entry.forget_policy()
        held_out = {id(e) for e in self.held_out}
        self.previous = [e for e in aging if e.age <= self.previous_steps and id(e) not in held_out]
        self.held_out = [e for e in self.held_out if e.age < _HELD_OUT_STEPS]
        kept = {id(e) for e in (*self.previous, *self.held_out)}
        for entry in (*aging, *self.current):
            if id(entry) not in kept:
                entry.trace.drop()
        self.current, self._queue, self._older, self._returned = [], [], [], []
        self._passes_left = self.passes

    def add(self, rollouts: Sequence[Rollout], weights: Iterable[float] | None = None) -> None:
        """Adds the traces of finished rollouts.

        Completions of fewer than two tokens teach nothing and are skipped.

        Args:
            rollouts: Rollouts; those without a trace are skipped.
            weights: Loss weight of each rollout; None weighs all equally.
        """
        trace_weights = [1.0] * len(rollouts) if weights is None else list(weights)
        added = [
            Entry(StoredTrace(r.trace), weight, group=number if r.request.group is None else r.request.group)
            for number, (r, weight) in enumerate(zip(rollouts, trace_weights, strict=True))
            if r.trace is not None and len(r.token_ids) >= 2
        ]
        groups = list(dict.fromkeys(e.group for e in added))
        held = (
            set(groups[self.held_out_every - 1 :: self.held_out_every]) if self.held_out_every > 0 else set()
        )
        self.held_out += [e for e in added if e.group in held]
        self.current += [e for e in added if e.group not in held]
        self._make_room()

    def _make_room(self) -> None:
        """Keeps the newest (then longest) traces in memory, moves the next to disk, and drops the rest."""
        order = sorted((*self.previous, *self.current), key=lambda e: (e.age, -e.trace.length))
        memory, disk = self.memory_tokens, self.disk_tokens
        dropped: set[int] = set()
        for entry in order:
            length = entry.trace.length
            if not entry.trace.on_disk and length <= memory:
                memory -= length
            elif length <= disk and (entry.trace.on_disk or self._to_disk(entry)):
                disk -= length
            else:
                dropped.add(id(entry))
                entry.trace.drop()
        self.previous = [e for e in self.previous if id(e) not in dropped]
        self.current = [e for e in self.current if id(e) not in dropped]

    def _to_disk(self, entry: Entry) -> bool:
        """Moves a trace to disk; returns False if it cannot be written."""
        assert self._spill is not None
        self._written += 1
        try:
            self._spill.mkdir(parents=True, exist_ok=True)
            entry.trace.spill(self._spill / f"trace-{self._written}.safetensors")
        except OSError:
            return False
        return True

    def next_batch(self, budget: int) -> list[Piece] | None:
        """Returns the next pieces of this step's passes, of at most ``budget`` anchors together.

        The order continues where the last call stopped, whatever happened in between.

        Returns:
            Pieces; None once this step's passes are complete.
        """
        if self._returned:
            batch, self._returned = self._returned, []
            return batch
        if not self._queue:
            if self._passes_left == 0 or not self.current:
                return None
            self._passes_left -= 1
            self._queue = self._shuffled(self.current, budget)
        older = int(budget * self.previous_share)
        batch = _take(self._queue, budget - (older if self.previous else 0))
        if self.previous:
            if not self._older:
                self._older = self._shuffled(self.previous, max(older, 1))
            batch += _take(self._older, budget - sum(p.end - p.begin for p in batch), at_least_one=False)
        return batch

    def put_back(self, batch: list[Piece]) -> None:
        """Takes back an unused batch; `next_batch` gives it out again, unless the step ends first."""
        self._returned = batch

    def held_out_batches(self, budget: int, count: int) -> list[list[Piece]]:
        """Returns up to ``count`` batches of held-out pieces, of at most ``budget`` anchors each.

        Pieces are taken from the groups in turn. The result does not change until a trace is added or a step
        begins.
        """
        groups: dict[tuple[int, Hashable], list[Piece]] = {}
        for entry in self.held_out:
            groups.setdefault((entry.age, entry.group), []).extend(pieces_of(entry, budget))
        in_turn = [
            piece
            for round_ in itertools.zip_longest(*groups.values())
            for piece in round_
            if piece is not None
        ][::-1]
        return [batch for _ in range(count) if (batch := _take(in_turn, budget))]

    def _shuffled(self, entries: Sequence[Entry], budget: int) -> list[Piece]:
        pieces = [piece for entry in entries for piece in pieces_of(entry, budget)]
        self._random.shuffle(pieces)
        return pieces

    def weight(self, entry: Entry) -> float:
        """Returns the loss weight of an entry at its current age."""
        return entry.weight * self.age_decay**entry.age

    @property
    def tokens(self) -> int:
        """The number of tokens of the current step's traces."""
        return sum(e.trace.length for e in self.current)


def pieces_of(entry: Entry, budget: int) -> list[Piece]:
    """Cuts a trace into pieces of at most ``budget`` anchors, and at most 512.

    The first anchor is the last token of the prompt, because no draft starts before it.
    """
    size = min(budget, LONGEST_PIECE)
    first, end = max(entry.trace.num_prompt - 1, 0), entry.trace.length - 1
    return [Piece(entry, begin, min(begin + size, end)) for begin in range(first, end, size)]


def _take(queue: list[Piece], budget: int, at_least_one: bool = True) -> list[Piece]:
    """Removes pieces from the end of ``queue`` while they fit into ``budget`` anchors and returns them.

    With ``at_least_one``, a first piece that is too long is taken, too.
    """
    batch: list[Piece] = []
    room = budget
    while queue and (queue[-1].end - queue[-1].begin <= room or (at_least_one and not batch)):
        piece = queue.pop()
        room -= piece.end - piece.begin
        batch.append(piece)
    return batch
