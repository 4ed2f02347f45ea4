"""Rollouts that share their beginnings (TreePO, Li et al., arXiv 2508.17445, section 2).

A prompt's samples grow as a tree, segment by segment. At the end of a segment what is still under way may
branch, the most uncertain first, until there are as many branches as the group has samples; what has fallen
into a loop is stopped. Where all branches are over before the group is full, others grow from the most
uncertain earlier ends of segments. Every token is drawn from the policy given those before it, but a group's
samples are not independent, and beginnings that branch count more than once.
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
    """A sample under way.

    Attributes:
        path: The segments it consists of, by number, the first one first.
        request: With its own seed, and what it branched off from.
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

    def over(self, branch: Branch, rollout: Rollout) -> None:
        """A branch has come to its end."""
        before = branch.request.resume
        self.drawn += len(rollout.token_ids) - (len(before.token_ids) if before is not None else 0)
        self.active.remove(branch)
        self.leaves.append((branch.path, rollout))

    def reached(self, branch: Branch, rollout: Rollout, segment: int) -> Junction:
        """A branch has come to the end of a segment, and goes on with the next."""
        drawn = rollout.logprobs[-segment:]
        junction = Junction(branch.path, rollout, -sum(drawn) / max(len(drawn), 1))
        self._junctions.append(junction)
        branch.path = (*branch.path, self._segment())
        return junction

    def branch(self, junctions: Sequence[Junction], width: int) -> list[Branch]:
        """Grows what there is room for from these, the most uncertain first, those that have grown least
        before all.
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
        """Where all branches are over before the group is full: grows others from earlier ends of segments,
        or from the prompt.
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
    """Decodes what is under way, and what branches off from it, to the end."""
    jobs = [(number, branch) for number, tree in enumerate(trees) for branch in tree.active]

    def over(index: int, rollout: Rollout) -> None:
        number, branch = jobs[index]
        looped = rollout.finish_reason is FinishReason.CANCELLED
        trees[number].over(branch, replace(rollout, finish_reason=FinishReason.LENGTH) if looped else rollout)
        on_leaf(number, len(trees[number].leaves) - 1, trees[number].leaves[-1][1])

    def at_mark(reached: list[tuple[int, Rollout]]) -> list[Request]:
        by_tree: dict[int, list[Junction]] = {}
        for index, rollout in reached:
            number, branch = jobs[index]
            if is_loop(rollout.token_ids):
                engine.cancel(branch.request)
            else:
                by_tree.setdefault(number, []).append(
                    trees[number].reached(branch, rollout, config.segment_tokens)
                )
        grown = [
            (number, b)
            for number, junctions in by_tree.items()
            for b in trees[number].branch(junctions, config.width)
        ]
        jobs.extend(grown)
        return [branch.request for _, branch in grown]

    requests = [branch.request for _, branch in jobs]
    engine.generate(requests, on_step, on_finish=over, mark=config.segment_tokens, on_mark=at_mark)
