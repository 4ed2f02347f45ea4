"""The rank's rollouts: engine, drafters, and the drafter's training, built from a recipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedModel

from drafter_trainer.initial import initial_drafter
from drafter_trainer.spot import LearnerReport, SpotTrainer
from drafter_trainer.vocabulary import move_vocabulary
from rl.config import RunConfig, draft_rules
from rl.distillation import reward_weights, spot_trainer, trace_buffer
from rl.errors import UserError
from rl.lengths.estimate import PredictedLengths
from rl.policies import fetch_policy, load_policy
from rl.prompts import encode_prompt, stable_seed, stop_token_ids
from rl.segments import OpenGroup, restored
from rl.shaping import assign_budgets, length_terms
from rl.tasks import Problem
from rl.tree_rollout import Tree, grow
from rollout import (
    PLAIN,
    FinishReason,
    Request,
    Rollout,
    RolloutEngine,
    SamplingParams,
    StepRecord,
    Strategy,
    default_tap_layers,
)
from rollout.drafters import Eagle3Drafter
from rollout.drafters.build import DrafterParts, build_drafter
from rollout.drafters.eagle3_model import Eagle3Model, eagle3_config

OnStep = Callable[[StepRecord], None] | None
OnFinish = Callable[[int, Problem, Rollout], None] | None
_WITH_WEIGHTS = {"eagle3", "composite"}  # these come with the EAGLE-3 drafter's weights, see `RolloutWorker.create_drafter`


@dataclass(slots=True)
class RankRollouts:
    """What one rank produced in one step; the samples of a problem are adjacent.

    Attributes:
        problems: One for each rollout.
        rollouts: In the same order.
        seconds: Wall time.
        records: The engine's decode steps.
        plain_seconds: Wall time of the same requests without speculation, where that was measured.
        plain_identical: Share of them whose tokens were the same, where that was measured.
        budgets: Tokens that each was asked for, where the recipe asks for some.
        places: Under which each was handed to ``on_finish``.
        paths: Segments of each, by number, where samples share beginnings.
        drawn: Tokens that were decoded for them.
    """

    problems: list[Problem]
    rollouts: list[Rollout]
    seconds: float
    records: list[StepRecord] = field(default_factory=list)
    plain_seconds: float | None = None
    plain_identical: float | None = None
    budgets: list[int] | None = None
    places: list[int] = field(default_factory=list)
    paths: list[tuple[int, ...]] | None = None
    drawn: int = 0

    def joined(self, more: RankRollouts) -> RankRollouts:
        """These, and others that were made after them."""
        later = [replace(record, at=record.at + self.seconds) for record in more.records]
        budgets = [*self.budgets, *more.budgets] if self.budgets is not None and more.budgets is not None else None
        paths = [*self.paths, *more.paths] if self.paths is not None and more.paths is not None else None
        return RankRollouts(
            [*self.problems, *more.problems],
            [*self.rollouts, *more.rollouts],
            self.seconds + more.seconds,
            [*self.records, *later],
            budgets=budgets,
            paths=paths,
            drawn=self.drawn + more.drawn,
        )


class RolloutWorker:
    """Owns the rank's engine and drafters.

    Args:
        config: The recipe.
        policy: The trainer's unwrapped module.
        tokenizer: Its tokenizer.
        rank: Of this process, for where it spills traces and in which order it trains on them.

    Attributes:
        open: Groups that are carried over to the next step.
        lengths: Predictions from prompts, where the recipe has them.
    """

    def __init__(self, config: RunConfig, policy: PreTrainedModel, tokenizer: Any, rank: int = 0) -> None:
        self.config = config
        self._policy = policy
        self._tokenizer = tokenizer
        self._wants_eagle3 = "eagle3" in config.speculation.drafters
        r = config.rollout
        self.tap_layers = default_tap_layers(policy.config.get_text_config().num_hidden_layers)
        self.dtype = getattr(torch, r.dtype)
        self._drafter_config = self._check_drafter() if self._wants_eagle3 else None
        self.engine = self._build_engine()
        self._parts = self._drafter_parts()
        self._add_drafters(name for name in config.speculation.drafters if name not in _WITH_WEIGHTS)
        self.params = SamplingParams(
            temperature=r.temperature,
            top_k=r.top_k,
            top_p=r.top_p,
            max_tokens=r.max_tokens,
            stop_token_ids=stop_token_ids(tokenizer, policy.generation_config),
            stop_strings=r.stop_strings,
        )
        self.buffer = trace_buffer(config, rank)
        self.spot: SpotTrainer | None = None
        self._drafter: Eagle3Drafter | None = None
        self.open: list[OpenGroup] = []
        self.lengths = self._length_estimate()
        self._use_strategy()

    def _check_drafter(self) -> LlamaConfig:
        try:
            return eagle3_config(self._policy.config, self.config.drafter.draft_vocab_size, self.tap_layers)
        except ValueError as error:
            raise UserError(str(error)) from None

    def _build_engine(self) -> RolloutEngine:
        r = self.config.rollout
        try:
            return RolloutEngine(
                self._policy,
                dtype=self.dtype,
                max_slots=r.max_slots,
                max_context=r.max_context,
                max_nodes=self.config.speculation.max_nodes,
                tap_layers=self.tap_layers if self._wants_eagle3 else (),
                collect_traces=self._wants_eagle3,
                collect_entropies=any(term.needs_entropies for term in length_terms(self.config.length)),
                decode_text=lambda ids: self._tokenizer.decode(ids, skip_special_tokens=True),
                kv_memory_bytes=None if r.kv_memory_gb is None else int(r.kv_memory_gb * 1e9),
                budgets=self.config.speculation.budgets,
            )
        except MemoryError as error:
            raise UserError(str(error)) from None

    def _length_estimate(self) -> PredictedLengths | None:
        if self.config.length.predictor == "observed":
            return None
        hidden = self._policy.config.get_text_config().hidden_size
        made = PredictedLengths(self.config.length, hidden, self.config.rollout.max_tokens, self.config.seed)
        self.engine.scheduler.lengths = made
        return made

    def _drafter_parts(self) -> DrafterParts:
        s = self.config.speculation
        draft_model = load_policy(fetch_policy(s.draft_model), self._policy.device) if s.draft_model is not None else None
        return DrafterParts(draft_rules(s), None, s.eagle3_window, draft_model, s.composite_match, s.clasp_skipped)

    def _add_drafters(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                self.engine.add_drafter(build_drafter(name, self.engine, self._parts))
            except ValueError as error:
                raise UserError(f"speculation.drafters: {error}") from None

    def _use_strategy(self) -> None:
        s = self.config.speculation
        try:
            self.engine.verify_with(s.verifier)
            if s.strategy == "adaptive":
                arms = [Strategy.parse(text) for text in s.arms]
                self.engine.adapt(arms, epsilon=s.epsilon, thompson=s.selection == "thompson", seed=self.config.seed)
                return
            wanted = Strategy.parse(s.strategy)
            waiting = wanted.drafter in _WITH_WEIGHTS and self._drafter is None and wanted.drafter in s.drafters
            self.engine.use_strategy(PLAIN if waiting else wanted)
        except ValueError as error:
            raise UserError(f"speculation.strategy: {error}") from None

    @property
    def needs_drafter(self) -> bool:
        """Whether the EAGLE-3 drafter is wanted and not there yet: its vocabulary comes from the first rollouts."""
        return self._wants_eagle3 and self.spot is None

    def requests(self, problems: Sequence[Problem], step: int) -> list[Request]:
        """``group_size`` requests for each problem. Seeds follow from (run seed, step, problem, sample)."""
        return [request for problem in problems for request in self._open(problem, step).requests]

    def _open(self, problem: Problem, step: int) -> OpenGroup:
        size, run = self.config.rollout.group_size, self.config.seed
        budgets = assign_budgets(self.config.length, size, f"{run}/{step}/{problem.key}")
        seeds = [stable_seed(run, step, problem.key, sample) for sample in range(size)]
        return OpenGroup(problem, self._ask(problem, seeds, budgets), budgets, [None] * size)

    def _ask(self, problem: Problem, seeds: list[int], budgets: list[int] | None) -> list[Request]:
        """A problem's requests, each told its budget."""
        ends = [""] * len(seeds) if budgets is None else [" " + self.config.length.budget_prompt.format(budget=b) for b in budgets]
        prompts = {end: encode_prompt(self._tokenizer, problem.question + end, self.config.task.system) for end in set(ends)}
        return [Request(prompts[e], self.params, s, group=problem.key) for e, s in zip(ends, seeds, strict=True)]

    def rollout(
        self,
        problems: Sequence[Problem],
        step: int,
        on_step: OnStep = None,
        on_finish: OnFinish = None,
    ) -> RankRollouts:
        """This step's rollouts: of these problems, or with segments of those groups, older ones too, that are whole by now.

        Args:
            problems: Of this rank.
            step: Of the run.
            on_step: Called after each decode step.
            on_finish: Called with each rollout, its place and its problem, as soon as it is over; with segments, as soon as its
                group is.

        Raises:
            UserError: when every request failed; the first reason is given.
        """
        begin = time.perf_counter()
        new = [self._open(problem, step) for problem in problems]
        if self.lengths is not None:
            prompts = list(dict.fromkeys(tuple(request.prompt_ids) for group in new for request in group.requests))
            self.lengths.read(dict(zip(prompts, self.engine.prompt_states(prompts), strict=True)))
        done = self._grow(new, on_step, on_finish) if self.config.rollout.tree else self._go_on(new, on_step, on_finish)
        done.seconds = time.perf_counter() - begin
        failed = [r for r in done.rollouts if r.finish_reason is FinishReason.FAILED]
        if failed and len(failed) == len(done.rollouts):
            raise UserError(f"step {step}: all {len(failed)} requests failed: {failed[0].error}")
        return done

    def _go_on(self, new: list[OpenGroup], on_step: OnStep, on_finish: OnFinish) -> RankRollouts:
        """Decodes these groups, and with segments those carried over. Returns the whole ones and carries the others."""
        groups, begin, records = [*self.open, *new], time.perf_counter(), list[StepRecord]()
        while groups and not any(group.whole for group in groups):  # an update of nothing would be none
            before = time.perf_counter() - begin
            self._decode(groups, on_step, on_finish)
            records += [replace(record, at=record.at + before) for record in self.engine.records]
        self.open = [group for group in groups if not group.whole]
        size = self.config.rollout.group_size
        done = RankRollouts([], [], 0.0, records)
        for number, group in enumerate(groups):
            if group.whole:
                done.problems += [group.problem] * size
                done.rollouts += group.finished()
                done.places += range(number * size, (number + 1) * size)
                done.budgets = [*(done.budgets or ()), *group.budgets] if group.budgets is not None else None
        done.drawn = sum(len(r.token_ids) for r in done.rollouts)
        return done

    def _grow(self, new: list[OpenGroup], on_step: OnStep, on_finish: OnFinish) -> RankRollouts:
        """The same with samples that share beginnings."""
        assert self.config.rollout.tree is not None
        size, trees = self.config.rollout.group_size, [Tree(group.problem, group.requests) for group in new]

        def leaf(number: int, order: int, rollout: Rollout) -> None:
            if on_finish is not None:
                on_finish(number * size + order, trees[number].problem, rollout)

        records = grow(self.engine, trees, self.config.rollout.tree, on_step, leaf)
        done = RankRollouts(
            [], [], 0.0, records, places=list(range(size * len(trees))), paths=[], drawn=sum(t.drawn for t in trees)
        )
        for tree, group in zip(trees, new, strict=True):
            done.problems += [tree.problem] * size
            done.rollouts += [replace(r, request=replace(r.request, resume=None)) for _, r in tree.leaves]
            done.paths = [*(done.paths or ()), *(path for path, _ in tree.leaves)]
            done.budgets = [*(done.budgets or ()), *group.budgets] if group.budgets is not None else None
        return done

    def _decode(
        self,
        groups: Sequence[OpenGroup],
        on_step: OnStep,
        on_finish: OnFinish,
    ) -> None:
        """Goes on with what is not over, a segment of each where the recipe has them."""
        segment, size = self.config.rollout.segment_tokens, self.config.rollout.group_size
        jobs = [(number, sample, request) for number, group in enumerate(groups) for sample, request in group.pending()]

        def finished(index: int, rollout: Rollout) -> None:
            number, sample, _ = jobs[index]
            group = groups[number]
            group.rollouts[sample] = rollout
            over = range(size) if segment is not None and group.whole else [sample] if segment is None else []
            for each in over:
                answer = group.rollouts[each]
                if on_finish is not None and answer is not None:
                    on_finish(number * size + each, group.problem, answer)

        self.engine.generate([request for _, _, request in jobs], on_step, on_finish=finished, segment=segment)

    def lessons(self, done: RankRollouts) -> tuple[list[dict[str, Any]], list[float]]:
        """What whole groups teach of lengths, as plain data, and the pinball losses of what had been predicted of them."""
        if self.lengths is None:
            return [], []
        by_prompt: dict[tuple[int, ...], list[int]] = {}
        for r in done.rollouts:
            by_prompt.setdefault(tuple(r.request.prompt_ids), []).append(len(r.token_ids))
        return self.lengths.examples(list(by_prompt.items()))

    def open_state(self) -> list[dict[str, Any]]:
        """Groups that are carried over to the next step, as JSON."""
        return [group.state() for group in self.open]

    def load_open(self, states: Sequence[dict[str, Any]], problems: Sequence[Problem]) -> None:
        """Goes on with groups from `open_state`; those whose problem the task no longer has are dropped."""
        by_key = {problem.key: problem for problem in problems}
        found = [restored(state, by_key, self._ask) for state in states]
        self.open = [group for group in found if group is not None]

    def measure_plain(self, done: RankRollouts) -> None:
        """Decodes the same requests again without speculation and notes the time, for a paired ratio."""
        selector, collect = self.engine.speculation.selector, self.engine.collect_traces
        self.engine.use_strategy(PLAIN)
        self.engine.collect_traces = False
        begin = time.perf_counter()
        again = self.engine.generate([r.request for r in done.rollouts])
        done.plain_seconds = time.perf_counter() - begin
        self.engine.speculation.selector, self.engine.collect_traces = selector, collect
        same = [a.token_ids == b.token_ids for a, b in zip(again, done.rollouts, strict=True)]
        done.plain_identical = sum(same) / len(same)

    def create_drafter(self, vocabulary: torch.Tensor | None, model: Eagle3Model | None = None) -> SpotTrainer:
        """Builds the EAGLE-3 drafter, fresh over ``vocabulary`` or from a checkpoint's ``model``. Returns its trainer."""
        if model is None:
            assert vocabulary is not None and self._drafter_config is not None
            model = initial_drafter(self._drafter_config, vocabulary, self._policy, self.config.seed)
        spot = spot_trainer(self.config, self._policy, model, self.buffer)
        self.spot = spot
        self._parts.eagle3 = self.spot.serving
        self._add_drafters(name for name in self.config.speculation.drafters if name in _WITH_WEIGHTS)
        drafter = self.engine.drafters["eagle3"]
        assert isinstance(drafter, Eagle3Drafter)
        self._drafter = drafter
        if self.config.speculation.strategy != "adaptive":
            self._use_strategy()
        return spot

    def learn_from(self, done: RankRollouts, rewards: Sequence[float]) -> None:
        """Hands the step's traces to the drafter's buffer."""
        self.buffer.begin_step()
        self.buffer.add(done.rollouts, reward_weights(rewards, self.config.drafter.reward_weight))

    def train_drafter(self, stop: Callable[[], bool]) -> LearnerReport:
        """Trains on the traces of recent steps until ``stop()``, or until the step's passes are through."""
        return LearnerReport() if self.spot is None else self.spot.run(stop)

    def change_vocabulary(self, vocabulary: torch.Tensor) -> None:
        """The drafter drafts other tokens from now on; what it knows of those that stay is kept."""
        if self.spot is None or torch.equal(vocabulary, self.spot.learner.model.vocabulary):
            return
        for learner in self.spot.learners:
            move_vocabulary(learner.model, learner.optimizer, vocabulary, self._policy.get_output_embeddings())
        self.spot.replace_model()

    def take_over_drafter(self) -> str | None:
        """The engine drafts with the weights to be served. Returns one line when they are unusable and the old ones stay."""
        if self.spot is None or self._drafter is None:
            return None
        try:
            self._drafter.load_weights(self.spot.serving)
        except ValueError as error:
            return str(error)
        for name in _WITH_WEIGHTS & self.engine.drafters.keys():
            self.engine.speculation.selector.drafter_changed(name)
        return None
