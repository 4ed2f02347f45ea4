"""One rank's engine and drafters, built from a recipe, and the rollouts that they make."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from paceline.rl.config.run import RunConfig
from paceline.rl.errors import UserError
from paceline.rl.generation.groups import Groups, OnFinish, OnStep
from paceline.rl.generation.policy_engine import policy_engine
from paceline.rl.generation.progress import RolloutProgress
from paceline.rl.generation.vllm import VllmRollouts, as_long_as
from paceline.rl.lengths.estimate import PredictedLengths
from paceline.rl.models.initial import tap_layers
from paceline.rl.models.loading import load_policy
from paceline.rl.models.policies import fetch_policy
from paceline.rl.rewards.registry import length_terms
from paceline.rl.tasks.prompts import stop_token_ids
from paceline.rl.tasks.task import Problem
from paceline.rl.types import RankRollouts
from paceline.rl.validation.speculation import draft_rules
from paceline.rollout import PLAIN, FinishReason, RolloutEngine, SamplingParams, Strategy
from paceline.rollout.drafter_factory import DrafterParts, build_drafter
from paceline.rollout.drafters import EAGLE3_DRAFTERS, Eagle3Drafter
from paceline.rollout.drafters.eagle3_model import Eagle3Model
from paceline.rollout.model.kept_prefixes import KeptPrefixes
from paceline.rollout.model.runner import ModelRunner
from paceline.rollout.strategy import Selector


class RolloutWorker:
    """Decodes a rank's completions with an engine that is built from the recipe.

    Args:
        config: The recipe.
        policy: The trainer's unwrapped module.
        tokenizer: The policy's tokenizer.
        vllm: The backend that decodes in the engine's place, or None; the engine then only reads the finished
            completions, for the drafter.
        other_memory: What the trainer takes of a GPU, see `trainer_memory`; None if it is not known.

    Attributes:
        engine: The rank's engine.
        groups: The groups of completions, including those that a later step finishes.
        params: How completions are sampled.
        tap_layers: The layers whose inputs the EAGLE-3 drafter reads.
        dtype: The engine's precision.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: PreTrainedModel,
        tokenizer: Any,
        vllm: VllmRollouts | None = None,
        other_memory: Mapping[str, int] | None = None,
    ) -> None:
        self.config, self._vllm = config, vllm
        self._policy, self._tokenizer = policy, tokenizer
        self._wants_eagle3 = "eagle3" in config.speculation.drafters
        r = config.rollout
        self.tap_layers = tap_layers(config.drafter, policy.config)
        self.dtype = getattr(torch, r.dtype)
        self.engine = self._build_engine(other_memory)
        self._parts = self._drafter_parts()
        self._add_drafters(name for name in config.speculation.drafters if name not in EAGLE3_DRAFTERS)
        self.params = SamplingParams(
            temperature=r.temperature,
            top_k=r.top_k,
            top_p=r.top_p,
            max_tokens=r.max_tokens,
            stop_token_ids=stop_token_ids(tokenizer, policy.generation_config),
            stop_strings=r.stop_strings,
        )
        self._drafter: Eagle3Drafter | None = None
        self.groups = Groups(
            config, self.engine, tokenizer, self.params, None if vllm is None else vllm.backend
        )
        self._use_strategy()

    def _build_engine(self, other_memory: Mapping[str, int] | None) -> RolloutEngine:
        r = self.config.rollout
        return policy_engine(
            self._policy,
            dtype=self.dtype,
            max_slots=r.max_slots,
            max_context=r.max_context,
            max_nodes=self.config.speculation.max_nodes,
            tap_layers=self.tap_layers if self._wants_eagle3 else (),
            collect_traces=self._wants_eagle3,
            collect_entropies=any(term.needs_entropies for term in length_terms(self.config.length)),
            # a stop string may be one
            decode_text=lambda ids: self._tokenizer.decode(ids, skip_special_tokens=False),
            kv_memory_bytes=None if r.kv_memory_gb is None else int(r.kv_memory_gb * 1e9),
            other_memory=other_memory,
            budgets=self.config.speculation.budgets,
        )

    def _drafter_parts(self) -> DrafterParts:
        s = self.config.speculation
        draft_model = (
            load_policy(fetch_policy(s.draft_model), self._policy.device)
            if s.draft_model is not None
            else None
        )
        return DrafterParts(
            draft_rules(s), None, s.eagle3_window, draft_model, s.composite_match, s.clasp_skipped
        )

    def _add_drafters(self, names: Iterable[str]) -> None:
        for name in names:
            try:
                self.engine.add_drafter(build_drafter(name, self.engine, self._parts))
            except ValueError as error:
                raise UserError(f"speculation.drafters: {error}") from None

    def _use_strategy(self) -> None:
        s = self.config.speculation
        if self._vllm is not None:
            self.engine.use_strategy(PLAIN)
            return
        try:
            self.engine.verify_with(s.verifier)
            if s.strategy == "adaptive":
                arms = [Strategy.parse(text) for text in s.arms]
                self.engine.adapt(
                    arms, epsilon=s.epsilon, thompson=s.selection == "thompson", seed=self.config.seed
                )
                return
            wanted = Strategy.parse(s.strategy)
            waiting = (
                wanted.drafter in EAGLE3_DRAFTERS and self._drafter is None and wanted.drafter in s.drafters
            )
            self.engine.use_strategy(PLAIN if waiting else wanted)
        except ValueError as error:
            raise UserError(f"speculation.strategy: {error}") from None

    @property
    def evaluation_params(self) -> SamplingParams:
        """How an evaluation samples completions."""
        temperature = self.config.evaluation.temperature
        return self.params if temperature is None else replace(self.params, temperature=temperature)

    def rollout(
        self, problems: Sequence[Problem], step: int, on_step: OnStep = None, on_finish: OnFinish = None
    ) -> RankRollouts:
        """Decodes a step's rollouts, see `Groups.rollout`.

        Raises:
            UserError: when every request failed, with the first reason.
        """
        batch = self.groups.rollout(problems, step, on_step, on_finish)
        failed = [r for r in batch.rollouts if r.finish_reason is FinishReason.FAILED]
        if failed and len(failed) == len(batch.rollouts):
            raise UserError(f"all {len(failed)} requests of a step failed: {failed[0].error}")
        return batch

    def measure_plain(self, batch: RankRollouts, progress: RolloutProgress | None = None) -> None:
        """Decodes the requests of a batch again without speculation, for a paired ratio.

        vLLM draws other tokens then: each request gets as many as before, whatever they are.

        Args:
            batch: Rollouts of this rank, to which the time is added, and by the engine also the share of
                equal completions.
            progress: Shows the progress to the user.
        """
        if self._vllm is not None:
            self._measure_plain_by_vllm(batch, progress)
            return
        engine = self.engine
        before = engine.speculation.selector, engine.collect_traces, engine.kept
        engine.use_strategy(PLAIN)
        engine.collect_traces, engine.kept = (
            False,
            KeptPrefixes(engine.runner.cache),
        )  # which reads every prompt, as the first time
        requests = [r.request for r in batch.rollouts]
        begin = time.perf_counter()
        try:
            if progress is None:
                again = engine.generate(requests)
            else:
                again = engine.generate(requests, progress.on_step, on_finish=progress.on_finish)
        finally:
            engine.speculation.selector, engine.collect_traces, engine.kept = before
        batch.plain_seconds = time.perf_counter() - begin
        same = [a.token_ids == b.token_ids for a, b in zip(again, batch.rollouts, strict=True)]
        batch.plain_identical = sum(same) / len(same)

    def _measure_plain_by_vllm(self, batch: RankRollouts, progress: RolloutProgress | None) -> None:
        assert self._vllm is not None
        requests = [as_long_as(r) for r in batch.rollouts if r.token_ids]
        begin = time.perf_counter()
        if progress is None:
            self._vllm.backend.generate_plain(requests)
        else:
            self._vllm.backend.generate_plain(requests, progress.on_step, on_finish=progress.on_finish)
        batch.plain_seconds = time.perf_counter() - begin

    @property
    def selector(self) -> Selector:
        """What chooses the strategy of each decode step."""
        return self.engine.speculation.selector

    def selector_state(self) -> dict[str, Any] | None:
        """Returns what the selector has learned, as JSON data; None for one that learns nothing."""
        return self.selector.state()

    @property
    def runner(self) -> ModelRunner:
        """Runs the policy's forwards in the engine."""
        return self.engine.runner

    def read_traces(self, batch: RankRollouts) -> None:
        """Runs the policy over completions that vLLM has decoded, to collect their traces."""
        self.engine.read_traces(batch.rollouts)

    @property
    def fusion(self) -> str:
        """Which of the policy's layers are fused, in words."""
        return self.engine.fusion

    @property
    def lengths(self) -> PredictedLengths | None:
        """The length predictor, where the recipe has one."""
        return self.groups.lengths

    @property
    def unfinished(self) -> int:
        """The number of completions that the next step continues."""
        return sum(len(group.pending()) for group in self.groups.open)

    def lessons(self, batch: RankRollouts) -> tuple[list[dict[str, Any]], list[float]]:
        """Returns what a step's groups teach the length predictor, and the losses of its predictions."""
        return self.groups.lessons(batch)

    def refresh_weights(self) -> None:
        """Lets the engine decode with the policy's present weights."""
        self.engine.refresh_weights()

    def length_weights(self) -> dict[str, torch.Tensor] | None:
        """Returns the weights of the length predictor, where the recipe has one."""
        return None if self.lengths is None else self.lengths.head.state()

    def restore_lengths(self, path: Path, steps_done: int) -> bool:
        """Loads the length predictor's weights, where the recipe has one.

        Returns:
            False when they cannot be read: lengths are then learned anew.
        """
        return self.lengths is None or self.lengths.restore(path, steps_done)

    def add_trained_drafter(self, weights: Eagle3Model) -> None:
        """Adds the EAGLE-3 drafter, and the drafters that are built on it, to the engine.

        Args:
            weights: The drafter's weights, which are copied.
        """
        self._parts.eagle3 = weights
        self._add_drafters(name for name in self.config.speculation.drafters if name in EAGLE3_DRAFTERS)
        drafter = self.engine.drafters["eagle3"]
        assert isinstance(drafter, Eagle3Drafter)
        self._drafter = drafter
        if self.config.speculation.strategy != "adaptive":
            self._use_strategy()

    def update_trained_drafter(self, weights: Eagle3Model) -> str | None:
        """Replaces the weights of the EAGLE-3 drafter.

        Args:
            weights: The new weights, which are copied.

        Returns:
            One line when they do not fit, and the old ones stay; otherwise None.
        """
        assert self._drafter is not None
        try:
            self._drafter.load_weights(weights)
        except ValueError as error:
            return str(error)
        for name in EAGLE3_DRAFTERS & self.engine.drafters.keys():
            self.engine.speculation.selector.drafter_changed(name)
        return None
