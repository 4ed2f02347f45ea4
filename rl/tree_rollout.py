"""Rollouts that share their beginnings (TreePO, Li et al., arXiv 2508.17445, section 2).

A prompt's samples grow as a tree, segment by segment. At the end of a segment what is still under way may branch, the most
uncertain first, until there are as many branches as the group has samples; what has fallen into a loop is stopped. Where all
branches are over before the group is full, others grow from the most uncertain earlier ends of segments. Every token is drawn from
the policy given those before it, but a group's samples are not independent, and beginnings that branch count more than once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from rl.lengths.statistics import is_loop
from rl.sections import TreeConfig
from rl.tasks import Problem
from rollout import FinishReason, Request, Rollout, RolloutEngine, StepRecord


@dataclass(slots=True)
class Branch:
    """A sample under way.

    Attributes:
        path: The segments it consists of, by number, the first one first.
        request: With its own seed, and the paused rollout it goes on from.
    """

    path: tuple[int, ...]
    request: Request


@dataclass(slots=True)
class Junction:
    """The end of a segment from which branches may grow; the less certain its tokens were, the sooner."""

    path: tuple[int, ...]
    rollout: Rollout
    uncertainty: float
    grown: int = 0


@dataclass(slots=True)
class Tree:
    """A prompt's samples.

    Attributes:
        problem: What is asked.
        requests: One for each sample, with a seed each; the prompts are the same.
        active: Branches under way.
        leaves: Those that are over, with their paths.
        drawn: Tokens decoded.
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
        return len(self.leaves) == len(self.requests)

    @property
    def room(self) -> int:
        """Samples that have not begun."""
        return len(self.requests) - self._started

    def start(self, count: int) -> None:
        """Branches from the prompt."""
        for _ in range(min(count, self.room)):
            self.active.append(Branch((self._segment(),), self._next()))

    def advance(self, branch: Branch, rollout: Rollout) -> None:
        """A segment of a branch is decoded."""
        before = branch.request.resume
        began = len(before.token_ids) if before is not None else 0
        self.drawn += len(rollout.token_ids) - began
        if rollout.finish_reason is FinishReason.PAUSED and is_loop(rollout.token_ids):
            rollout = replace(rollout, finish_reason=FinishReason.LENGTH)
        if rollout.finish_reason is not FinishReason.PAUSED:
            self.leaves.append((branch.path, rollout))
            return
        drawn = rollout.logprobs[began:]
        self._junctions.append(Junction(branch.path, rollout, -sum(drawn) / max(len(drawn), 1)))
        self.active.append(Branch((*branch.path, self._segment()), replace(branch.request, resume=rollout)))

    def branch(self, tree: TreeConfig) -> None:
        """Grows what there is room for: at the ends just reached, or, where nothing is under way, at earlier ones."""
        ends = {id(b.request.resume) for b in self.active}
        here = [j for j in self._junctions if id(j.rollout) in ends] if self.active else self._junctions
        for junction in sorted(here, key=lambda j: (j.grown, -j.uncertainty)):
            for _ in range(min(tree.width - 1, self.room)):
                junction.grown += 1
                request = replace(self._next(), resume=junction.rollout)
                self.active.append(Branch((*junction.path, self._segment()), request))
        if not self.active and not self.full:
            self.start(self.room)

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
    """Grows trees until all are full.

    Args:
        engine: That decodes.
        trees: With no branch yet.
        config: The recipe's.
        on_step: Called after each decode step.
        on_leaf: Called with a tree's number, a leaf's and its rollout, as soon as it is over.

    Returns:
        The decode steps.
    """
    records: list[StepRecord] = []
    for tree in trees:
        tree.start(config.roots)
    elapsed = 0.0
    while any(tree.active for tree in trees):
        jobs = [(number, branch) for number, tree in enumerate(trees) for branch in tree.active]
        for tree in trees:
            tree.active = []

        def segment_over(index: int, rollout: Rollout, jobs: list[tuple[int, Branch]] = jobs) -> None:
            number, branch = jobs[index]
            tree = trees[number]
            leaves = len(tree.leaves)
            tree.advance(branch, rollout)
            if len(tree.leaves) > leaves:
                on_leaf(number, leaves, tree.leaves[-1][1])

        engine.generate([b.request for _, b in jobs], on_step, on_finish=segment_over, segment=config.segment_tokens)
        records += [replace(record, at=record.at + elapsed) for record in engine.records]
        elapsed = records[-1].at if records else elapsed
        for tree in trees:
            tree.branch(config)
    return records
