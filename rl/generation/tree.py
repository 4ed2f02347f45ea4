"""Rollouts that share prefixes (TreePO, Li et al., arXiv 2508.17445, section 2).

A prompt's samples grow as a tree, segment by segment. At the end of a segment, unfinished samples may branch,
the most uncertain first, until there are as many branches as the group has samples. Samples that repeat
themselves are stopped. When all branches finish before the group is full, others grow from the most uncertain
earlier ends of segments. Every token is sampled from the policy given its prefix, but a group's samples are
not independent, and a shared prefix counts once for each branch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from paceline.rl.config.rollout import TreeConfig
from paceline.rl.lengths.statistics import is_loop
from paceline.rl.tasks.task import Problem
from paceline.rollout import FinishReason, Request, Rollout, RolloutEngine, StepRecord


@dataclass(slots=True)
class Branch:
    """An unfinished sample.

    Attributes:
        path: The numbers of its segments, in order.
        request: Its request, with its own seed and the prefix that it continues.
    """

    path: tuple[int, ...]
    request: Request


@dataclass(slots=True)
class Junction:
    """The end of a segment, from which branches may grow; the most uncertain ones grow first."""

    path: tuple[int, ...]
    rollout: Rollout
    uncertainty: float
    grown: int = 0


@dataclass(slots=True)
class Tree:
    """A prompt's samples as a tree.

    Attributes:
        problem: The problem that is asked.
        requests: The request of each sample: equal prompts, different seeds.
        active: Unfinished branches.
        leaves: Finished samples with their paths.
        drawn: The number of tokens decoded.
    """

    problem: Problem
    requests: list[Request]
    active: list[Branch] = field(default_factory=list)
    leaves: list[tuple[tuple[int, ...], Rollout]] = field(default_factory=list)
    drawn: int = 0
    _junctions: list[Junction] = field(default_factory=list)
    _started: int = 0
    _segments: int = 0

    @property
    def full(self) -> bool:
        """Whether every sample is finished."""
        return len(self.leaves) == len(self.requests)

    @property
    def room(self) -> int:
        """The number of samples that have not started."""
        return len(self.requests) - self._started

    def start(self, count: int) -> None:
        """Starts ``count`` branches at the prompt, as far as there is room."""
        for _ in range(min(count, self.room)):
            self.active.append(Branch((self._segment(),), self._next()))

    def finish(self, branch: Branch, rollout: Rollout) -> None:
        """Records a finished branch."""
        before = branch.request.resume
        self.drawn += len(rollout.token_ids) - (len(before.token_ids) if before is not None else 0)
        self.active.remove(branch)
        self.leaves.append((branch.path, rollout))

    def end_segment(self, branch: Branch, rollout: Rollout, segment: int) -> Junction:
        """Records that a branch has finished a segment of ``segment`` tokens and continues with the next."""
        drawn = rollout.logprobs[-segment:]
        junction = Junction(branch.path, rollout, -sum(drawn) / max(len(drawn), 1))
        self._junctions.append(junction)
        branch.path = (*branch.path, self._segment())
        return junction

    def branch(self, junctions: Sequence[Junction], width: int) -> list[Branch]:
        """Grows as many branches as there is room for, first from junctions with the fewest branches.

        Among these, the most uncertain ones come first.
        """
        grown = []
        for junction in sorted(junctions, key=lambda j: (j.grown, -j.uncertainty)):
            for _ in range(min(width - 1, self.room)):
                junction.grown += 1
                grown.append(
                    Branch((*junction.path, self._segment()), replace(self._next(), resume=junction.rollout))
                )
        self.active += grown
        return grown

    def fill(self, width: int) -> None:
        """Grows further branches when all are finished before the group is full.

        They start at earlier ends of segments, or at the prompt when there are none.
        """
        if not self.active and not self.full:
            self.branch(self._junctions, width)
            self.start(self.room if not self._junctions else 0)

    def _next(self) -> Request:
        self._started += 1
        return self.requests[self._started - 1]

    def _segment(self) -> int:
        self._segments += 1
        return self._segments


def grow(
    engine: RolloutEngine,
    trees: Sequence[Tree],
    config: TreeConfig,
    on_step: Callable[[StepRecord], None] | None,
    on_leaf: Callable[[int, int, Rollout], None],
) -> list[StepRecord]:
    """Grows trees until every sample is finished.

    Args:
        engine: The engine that decodes.
        trees: Trees without branches.
        config: The recipe's ``rollout.tree``.
        on_step: Called after each decode step.
        on_leaf: Called with the index of a tree, the index of a leaf and its rollout, as soon as it finishes.

    Returns:
        The records of all decode steps.
    """
    records: list[StepRecord] = []
    for tree in trees:
        tree.start(config.roots)
    while any(tree.active for tree in trees):
        _grow(engine, trees, config, on_step, on_leaf)
        elapsed = records[-1].at if records else 0.0
        records += [replace(record, at=record.at + elapsed) for record in engine.records]
        for tree in trees:
            tree.fill(config.width)
    return records


def _grow(
    engine: RolloutEngine,
    trees: Sequence[Tree],
    config: TreeConfig,
    on_step: Callable[[StepRecord], None] | None,
    on_leaf: Callable[[int, int, Rollout], None],
) -> None:
    """Decodes the active branches, and those that grow from them, to their ends."""
    jobs = [(number, branch) for number, tree in enumerate(trees) for branch in tree.active]

    def finished(index: int, rollout: Rollout) -> None:
        number, branch = jobs[index]
        looped = rollout.finish_reason is FinishReason.CANCELLED
        trees[number].finish(
            branch, replace(rollout, finish_reason=FinishReason.LENGTH) if looped else rollout
        )
        on_leaf(number, len(trees[number].leaves) - 1, trees[number].leaves[-1][1])

    def at_mark(reached: list[tuple[int, Rollout]]) -> list[Request]:
        by_tree: dict[int, list[Junction]] = {}
        for index, rollout in reached:
            number, branch = jobs[index]
            if is_loop(rollout.token_ids):
                engine.cancel(branch.request)
            else:
                by_tree.setdefault(number, []).append(
                    trees[number].end_segment(branch, rollout, config.segment_tokens)
                )
        grown = [
            (number, b)
            for number, junctions in by_tree.items()
            for b in trees[number].branch(junctions, config.width)
        ]
        jobs.extend(grown)
        return [branch.request for _, branch in grown]

    requests = [branch.request for _, branch in jobs]
    engine.generate(requests, on_step, on_finish=finished, mark=config.segment_tokens, on_mark=at_mark)
