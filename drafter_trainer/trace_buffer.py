"""What the engine's forwards saw of recent rollouts, and in which order the drafter learns from it."""

from __future__ import annotations

import itertools
import random
import statistics
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from paceline.drafter_trainer.stored_trace import StoredTrace
from paceline.rollout.api import Rollout

_JUDGING_STEPS = 3


@dataclass(slots=True)
class Entry:
    """A trace in the buffer: how much it counts, its age in RL steps, and the group of samples it belongs
    to.
    """

    trace: StoredTrace
    weight: float = 1.0
    age: int = 0
    group: Hashable = None


@dataclass(frozen=True, slots=True)
class Piece:
    """A stretch of a trace, short enough for a micro-batch: anchors ``begin`` to ``end``."""

    entry: Entry
    begin: int
    end: int


class TraceBuffer:
    """The traces of this step and the long ones of the steps before; all came from the policy itself,
    verified.

    Short sequences end first, so what a rank holds while others still decode is biased towards them. Keeping
    of earlier steps the sequences that were longer than their step's median makes up for it (TLT, arXiv
    2511.16665, calls it one-step-off sampling).

    What judges drafters are whole groups: the samples of a prompt are so alike that a drafter which has
        learned some of them by
    heart does well on the others, and worse on the next step's prompts.

    Args:
        memory_tokens: Tokens of traces in memory, beside those kept back; the newest and of these the longest
            stay there.
        disk_tokens: Tokens on disk, for those that come next; the rest is left out.
        spill: Directory for them; None leaves out what memory does not hold.
        previous_steps: How many steps back long sequences are kept.
        previous_share: Share of a micro-batch that comes from them.
        age_decay: Weight of a trace for each step of its age.
        held_out_every: Every so many-th group is not trained on, but judges drafters, for three steps; 0
            keeps none back.
        passes: Passes over a step's traces, at most.
        seed: Of the order.
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

    def begin_step(self) -> None:
        """A new step: what was current and long joins the previous; what is too old is dropped."""
        middle = statistics.median([e.trace.length for e in self.current]) if self.current else 0
        aging = [*self.previous, *(e for e in self.current if e.trace.length >= middle), *self.held_out]
        for entry in aging:
            entry.age += 1
        judges = {id(e) for e in self.held_out}
        self.previous = [e for e in aging if e.age <= self.previous_steps and id(e) not in judges]
        self.held_out = [e for e in self.held_out if e.age < _JUDGING_STEPS]
        kept = {id(e) for e in (*self.previous, *self.held_out)}
        for entry in (*aging, *self.current):
            if id(entry) not in kept:
                entry.trace.drop()
        self.current, self._queue, self._older, self._returned = [], [], [], []
        self._passes_left = self.passes

    def add(self, rollouts: Sequence[Rollout], weights: Iterable[float] | None = None) -> None:
        """Keeps the traces of finished rollouts. Those with fewer than two completion tokens teach nothing
        and are skipped.

        Args:
            rollouts: With traces.
            weights: How much each counts; None for all alike.
        """
        given = [1.0] * len(rollouts) if weights is None else list(weights)
        fresh = [
            Entry(StoredTrace(r.trace), weight, group=number if r.request.group is None else r.request.group)
            for number, (r, weight) in enumerate(zip(rollouts, given, strict=True))
            if r.trace is not None and len(r.token_ids) >= 2
        ]
        groups = list(dict.fromkeys(e.group for e in fresh))
        held = (
            set(groups[self.held_out_every - 1 :: self.held_out_every]) if self.held_out_every > 0 else set()
        )
        self.held_out += [e for e in fresh if e.group in held]
        self.current += [e for e in fresh if e.group not in held]
        self._make_room()

    def _make_room(self) -> None:
        """The newest and of these the longest stay in memory, the next go to disk, the rest is left out."""
        order = sorted((*self.previous, *self.current), key=lambda e: (e.age, -e.trace.length))
        memory, disk = self.memory_tokens, self.disk_tokens
        gone: set[int] = set()
        for entry in order:
            length = entry.trace.length
            if not entry.trace.on_disk and length <= memory:
                memory -= length
            elif length <= disk and (entry.trace.on_disk or self._to_disk(entry)):
                disk -= length
            else:
                gone.add(id(entry))
                entry.trace.drop()
        self.previous = [e for e in self.previous if id(e) not in gone]
        self.current = [e for e in self.current if id(e) not in gone]

    def _to_disk(self, entry: Entry) -> bool:
        assert self._spill is not None
        self._written += 1
        try:
            self._spill.mkdir(parents=True, exist_ok=True)
            entry.trace.spill(self._spill / f"trace-{self._written}.safetensors")
        except OSError:
            return False
        return True

    def next_batch(self, budget: int) -> list[Piece] | None:
        """Pieces of at most ``budget`` anchors together, the next of this step's passes; None when they are
        through.

        The order goes on where the last call stopped, whatever happened in between.
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
        """It was not learned from: `next_batch` gives it again, unless the step ends before."""
        self._returned = batch

    def held_out_batches(self, budget: int, count: int) -> list[list[Piece]]:
        """Of what is kept back, up to ``count`` batches of ``budget`` anchors, a sequence of each group in
        turn; the same until something is added.
        """
        groups: dict[tuple[int, Hashable], list[Piece]] = {}
        for entry in self.held_out:
            groups.setdefault((entry.age, entry.group), []).extend(pieces_of(entry, budget))
        left = [
            piece for turn in itertools.zip_longest(*groups.values()) for piece in turn if piece is not None
        ][::-1]
        return [batch for _ in range(count) if (batch := _take(left, budget))]

    def _shuffled(self, entries: Sequence[Entry], budget: int) -> list[Piece]:
        pieces = [piece for entry in entries for piece in pieces_of(entry, budget)]
        self._random.shuffle(pieces)
        return pieces

    def weight(self, entry: Entry) -> float:
        """How much an entry counts now."""
        return entry.weight * self.age_decay**entry.age

    @property
    def tokens(self) -> int:
        """Tokens of the current step's traces."""
        return sum(e.trace.length for e in self.current)


def pieces_of(entry: Entry, budget: int) -> list[Piece]:
    """A trace cut into stretches of at most ``budget`` anchors, without those that lie in the prompt alone:
    they teach nothing.
    """
    anchors = entry.trace.length - 1
    cuts = range(0, anchors, budget)
    return [
        Piece(entry, at, min(at + budget, anchors))
        for at in cuts
        if min(at + budget, anchors) >= entry.trace.num_prompt
    ]


def _take(queue: list[Piece], budget: int, at_least_one: bool = True) -> list[Piece]:
    """Removes pieces from the end of ``queue`` while they fit."""
    taken: list[Piece] = []
    room = budget
    while queue and (queue[-1].end - queue[-1].begin <= room or (at_least_one and not taken)):
        piece = queue.pop()
        room -= piece.end - piece.begin
        taken.append(piece)
    return taken
