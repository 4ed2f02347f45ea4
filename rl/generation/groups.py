"""Decodes a step's groups of completions: whole, in segments that last over steps, or as trees."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from accelerate.utils import gather_object

from paceline.rl.config.run import RunConfig
from paceline.rl.generation.segments import OpenGroup, restored
from paceline.rl.generation.tree import Tree, grow
from paceline.rl.lengths.estimate import PredictedLengths
from paceline.rl.rewards.budgets import assign_budgets
from paceline.rl.tasks.prompts import encode_problem, seed_key, stable_seed
from paceline.rl.tasks.task import Problem
from paceline.rl.types import RankRollouts
from paceline.rollout import Request, Rollout, RolloutEngine, SamplingParams, StepRecord
from paceline.rollout.backends import Decoder

OnStep = Callable[[StepRecord], None] | None
OnFinish = Callable[[int, Problem, Rollout], None] | None


class Groups:
    """Turns a rank's problems into groups of requests and decodes them.

    Args:
        config: The recipe.
        engine: The engine, which decodes and computes hidden states of prompts.
        tokenizer: The policy's tokenizer.
        params: How completions are sampled.
        decoder: What decodes in the engine's place; None for the engine.

    Attributes:
        open: Unfinished groups, which the next step continues.
        lengths: The length predictor, where the recipe has one.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: RolloutEngine,
        tokenizer: Any,
        params: SamplingParams,
        decoder: Decoder | None = None,
    ) -> None:
        self._config, self._engine, self._tokenizer, self._params = config, engine, tokenizer, params
        self._decoder = engine if decoder is None else decoder
        self.open: list[OpenGroup] = []
        self.lengths: PredictedLengths | None = None
        if config.length.predictor != "observed":
            hidden = engine.runner.hidden_size
            self.lengths = PredictedLengths(config.length, hidden, config.rollout.max_tokens, config.seed)
            engine.scheduler.lengths = self.lengths

    def requests(self, problems: Sequence[Problem], step: int) -> list[Request]:
        """Returns ``group_size`` requests per problem, seeded by (run seed, step, problem, sample)."""
        return [request for problem in problems for request in self._open(problem, step).requests]

    def _open(self, problem: Problem, step: int) -> OpenGroup:
        size, run = self._config.rollout.group_size, self._config.seed
        budgets = assign_budgets(self._config.length, size, f"{run}/{step}/{seed_key(problem)}")
        seeds = [stable_seed(run, step, seed_key(problem), sample) for sample in range(size)]
        return OpenGroup(problem, self._ask(problem, seeds, budgets), budgets, [None] * size)

    def _ask(self, problem: Problem, seeds: list[int], budgets: list[int] | None) -> list[Request]:
        """Returns a problem's requests; each prompt states its token budget, where there are budgets."""
        ends = (
            [""] * len(seeds)
            if budgets is None
            else [" " + self._config.length.budget_prompt.format(budget=b) for b in budgets]
        )
        prompts = {end: encode_problem(self._tokenizer, problem, self._config.task, end) for end in set(ends)}
        return [
            Request(prompts[e], self._params, s, group=problem.key) for e, s in zip(ends, seeds, strict=True)
        ]

    def rollout(
        self,
        problems: Sequence[Problem],
        step: int,
        on_step: OnStep = None,
        on_finish: OnFinish = None,
    ) -> RankRollouts:
        """Decodes the groups of these problems; with segments, returns all groups that are finished by now.

        Args:
            problems: This rank's problems.
            step: Index of the step, which decides the seeds.
            on_step: Called after each decode step.
            on_finish: Called with the index, the problem and the rollout of each finished sample; with
                segments, when its whole group is finished.
        """
        begin = time.perf_counter()
        new = [self._open(problem, step) for problem in problems]
        if self.lengths is not None:
            prompts = list(
                dict.fromkeys(tuple(request.prompt_ids) for group in new for request in group.requests)
            )
            self.lengths.read(dict(zip(prompts, self._engine.prompt_states(prompts), strict=True)))
        batch = (
            self._grow(new, on_step, on_finish)
            if self._config.rollout.tree
            else self._continue(new, on_step, on_finish)
        )
        batch.seconds = time.perf_counter() - begin
        return batch

    def _continue(self, new: list[OpenGroup], on_step: OnStep, on_finish: OnFinish) -> RankRollouts:
        """Decodes new and unfinished groups, returns the finished ones and keeps the others."""
        groups, begin, records = [*self.open, *new], time.perf_counter(), list[StepRecord]()
        while groups and not any(group.finished for group in groups):  # an update needs at least one group
            before = time.perf_counter() - begin
            self._decode(groups, on_step, on_finish)
            records += [replace(record, at=record.at + before) for record in self._decoder.records]
        self.open = [group for group in groups if not group.finished]
        size = self._config.rollout.group_size
        batch = RankRollouts([], [], 0.0, records)
        for number, group in enumerate(groups):
            if group.finished:
                batch.problems += [group.problem] * size
                batch.rollouts += group.samples()
                batch.places += range(number * size, (number + 1) * size)
                batch.budgets = (
                    [*(batch.budgets or ()), *group.budgets] if group.budgets is not None else None
                )
        batch.drawn = sum(len(r.token_ids) for r in batch.rollouts)
        return batch

    def _grow(self, new: list[OpenGroup], on_step: OnStep, on_finish: OnFinish) -> RankRollouts:
        """Decodes groups as trees, whose samples share prefixes."""
        assert self._config.rollout.tree is not None
        size, trees = self._config.rollout.group_size, [Tree(group.problem, group.requests) for group in new]

        def leaf(number: int, order: int, rollout: Rollout) -> None:
            if on_finish is not None:
                on_finish(number * size + order, trees[number].problem, rollout)

        records = grow(self._engine, trees, self._config.rollout.tree, on_step, leaf)
        batch = RankRollouts(
            [],
            [],
            0.0,
            records,
            places=list(range(size * len(trees))),
            paths=[],
            drawn=sum(t.drawn for t in trees),
        )
        for tree, group in zip(trees, new, strict=True):
            batch.problems += [tree.problem] * size
            batch.rollouts += [replace(r, request=replace(r.request, resume=None)) for _, r in tree.leaves]
            batch.paths = [*(batch.paths or ()), *(path for path, _ in tree.leaves)]
            batch.budgets = [*(batch.budgets or ()), *group.budgets] if group.budgets is not None else None
        return batch

    def _decode(
        self,
        groups: Sequence[OpenGroup],
        on_step: OnStep,
        on_finish: OnFinish,
    ) -> None:
        """Decodes unfinished samples to their ends, or by one segment where the recipe has segments."""
        segment, size = self._config.rollout.segment_tokens, self._config.rollout.group_size
        jobs = [
            (number, sample, request)
            for number, group in enumerate(groups)
            for sample, request in group.pending()
        ]

        def finished(index: int, rollout: Rollout) -> None:
            number, sample, _ = jobs[index]
            group = groups[number]
            group.rollouts[sample] = rollout
            ready = (
                range(size) if segment is not None and group.finished else [sample] if segment is None else []
            )
            for each in ready:
                answer = group.rollouts[each]
                if on_finish is not None and answer is not None:
                    on_finish(number * size + each, group.problem, answer)

        requests = [request for _, _, request in jobs]
        if segment is None:
            self._decoder.generate(requests, on_step, on_finish=finished)
        else:
            self._engine.generate(requests, on_step, on_finish=finished, segment=segment)

    def lessons(self, batch: RankRollouts) -> tuple[list[dict[str, Any]], list[float]]:
        """Returns examples for the length predictor, and the pinball losses of its predictions."""
        if self.lengths is None:
            return [], []
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for r in batch.rollouts:
            by_prompt.setdefault(tuple(r.request.prompt_ids), []).append(len(r.token_ids))
        return self.lengths.examples(list(by_prompt.items()))

    def open_state(self) -> list[dict[str, Any]]:
        """Returns the unfinished groups as JSON data."""
        return [group.state() for group in self.open]

    def load_open(self, states: Sequence[dict[str, Any]], find: Callable[[str], Problem]) -> None:
        """Restores groups from `open_state`; those for which ``find`` raises KeyError are dropped."""
        groups = [restored(state, find, self._ask) for state in states]
        self.open = [group for group in groups if group is not None]


class CarriedGroups:
    """Keeps the unfinished groups of all ranks in checkpoints; any number of ranks can resume them.

    Args:
        groups: This rank's groups.
        find: Returns the problem of a key; groups for whose key it raises KeyError are dropped.
        accelerator: The run's accelerator.
    """

    def __init__(self, groups: Groups, find: Callable[[str], Problem], accelerator: Accelerator) -> None:
        self._groups, self._find, self._accelerator = groups, find, accelerator

    def state(self) -> list[dict[str, Any]]:
        """Returns the unfinished groups of all ranks. Collective."""
        return gather_object(self._groups.open_state())

    def load_state(self, state: list[dict[str, Any]]) -> None:
        """Takes this rank's share of the groups that `state` returned."""
        rank, ranks = self._accelerator.process_index, self._accelerator.num_processes
        self._groups.load_open(state[rank::ranks], self._find)
