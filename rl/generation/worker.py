"""The rank's rollouts: engine, drafters, and the drafter's training, built from a recipe."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from transformers import LlamaConfig, PreTrainedModel

from paceline.drafter_trainer.initialization import initial_drafter
from paceline.drafter_trainer.learner import first_non_finite
from paceline.drafter_trainer.spot_trainer import LearnerReport, SpotTrainer
from paceline.drafter_trainer.vocabulary import move_vocabulary
from paceline.rl.config.run import RunConfig
from paceline.rl.drafting.factory import reward_weights, spot_trainer, trace_buffer
from paceline.rl.errors import UserError
from paceline.rl.generation.groups import Groups, OnFinish, OnStep
from paceline.rl.generation.policy_engine import policy_engine
from paceline.rl.generation.progress import RolloutProgress
from paceline.rl.generation.vllm import VllmRollouts
from paceline.rl.models.initial import tap_layers
from paceline.rl.models.policies import fetch_policy, load_policy
from paceline.rl.rewards.shaping import length_terms
from paceline.rl.tasks.prompts import stop_token_ids
from paceline.rl.tasks.task import Problem
from paceline.rl.types import RankRollouts
from paceline.rl.validation.speculation import draft_rules
from paceline.rollout import PLAIN, FinishReason, RolloutEngine, SamplingParams, Strategy
from paceline.rollout.drafters import Eagle3Drafter
from paceline.rollout.drafters.build import DrafterParts, build_drafter
from paceline.rollout.drafters.eagle3_model import Eagle3Model, eagle3_config
from paceline.rollout.engine.kept_prefixes import KeptPrefixes

_WITH_WEIGHTS = {
    "eagle3",
    "composite",
}  # these come with the EAGLE-3 drafter's weights, see `RolloutWorker.create_drafter`


class RolloutWorker:
    """Owns the rank's engine and drafters.

    Args:
        config: The recipe.
        policy: The trainer's unwrapped module.
        tokenizer: Its tokenizer.
        rank: Of this process, for where it spills traces and in which order it trains on them.
        vllm: Decodes in the engine's place, where the recipe has it; the engine then reads what was drawn,
            for the drafter.

    Attributes:
        groups: Makes the rollouts, and carries what is not over.
        policy_config: The policy's.
    """

    def __init__(
        self,
        config: RunConfig,
        policy: PreTrainedModel,
        tokenizer: Any,
        rank: int = 0,
        vllm: VllmRollouts | None = None,
    ) -> None:
        self.config, self._vllm = config, vllm
        self._policy, self.policy_config = policy, policy.config
        self._tokenizer = tokenizer
        self._wants_eagle3 = "eagle3" in config.speculation.drafters
        r = config.rollout
        self.tap_layers = tap_layers(config.drafter, policy.config)
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
        self.groups = Groups(
            config, self.engine, tokenizer, self.params, None if vllm is None else vllm.backend
        )
        self._use_strategy()

    def _check_drafter(self) -> LlamaConfig:
        try:
            return eagle3_config(self._policy.config, self.config.drafter.draft_vocab_size, self.tap_layers)
        except ValueError as error:
            raise UserError(str(error)) from None

    def _build_engine(self) -> RolloutEngine:
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
                wanted.drafter in _WITH_WEIGHTS and self._drafter is None and wanted.drafter in s.drafters
            )
            self.engine.use_strategy(PLAIN if waiting else wanted)
        except ValueError as error:
            raise UserError(f"speculation.strategy: {error}") from None

    @property
    def evaluation_params(self) -> SamplingParams:
        """How completions of an evaluation are sampled."""
        temperature = self.config.evaluation.temperature
        return self.params if temperature is None else replace(self.params, temperature=temperature)

    @property
    def needs_drafter(self) -> bool:
        """Whether the EAGLE-3 drafter is wanted and not there yet: its vocabulary comes from the first
        rollouts.
        """
        return self._wants_eagle3 and self.spot is None

    def rollout(
        self, problems: Sequence[Problem], step: int, on_step: OnStep = None, on_finish: OnFinish = None
    ) -> RankRollouts:
        """This step's rollouts: see `Groups.rollout`.

        Raises:
            UserError: when every request failed; the first reason is given.
        """
        done = self.groups.rollout(problems, step, on_step, on_finish)
        failed = [r for r in done.rollouts if r.finish_reason is FinishReason.FAILED]
        if failed and len(failed) == len(done.rollouts):
            raise UserError(f"all {len(failed)} requests of a step failed: {failed[0].error}")
        return done

    def measure_plain(self, done: RankRollouts, progress: RolloutProgress | None = None) -> None:
        """Decodes the same requests again without speculation and notes the time, for a paired ratio.

        Args:
            done: Rollouts of this rank; the time is noted there.
            progress: Shows how far it is.
        """
        engine = self.engine
        before = engine.speculation.selector, engine.collect_traces, engine.kept
        engine.use_strategy(PLAIN)
        engine.collect_traces, engine.kept = (
            False,
            KeptPrefixes(engine.runner.cache),
        )  # which reads every prompt, as the first time
        requests = [r.request for r in done.rollouts]
        begin = time.perf_counter()
        try:
            if progress is None:
                again = engine.generate(requests)
            else:
                again = engine.generate(requests, progress.on_step, on_finish=progress.on_finish)
        finally:
            engine.speculation.selector, engine.collect_traces, engine.kept = before
        done.plain_seconds = time.perf_counter() - begin
        same = [a.token_ids == b.token_ids for a, b in zip(again, done.rollouts, strict=True)]
        done.plain_identical = sum(same) / len(same)

    def create_drafter(
        self, vocabulary: torch.Tensor | None, model: Eagle3Model | None = None
    ) -> SpotTrainer:
        """Builds the EAGLE-3 drafter, fresh over ``vocabulary`` or from a checkpoint's ``model``. Returns its
        trainer.
        """
        if model is None:
            assert vocabulary is not None and self._drafter_config is not None
            model = initial_drafter(self._drafter_config, vocabulary, self._policy, self.config.seed)
        spot = spot_trainer(self.config, self._policy, model, self.buffer)
        self.spot = spot
        if self._vllm is not None:
            # after a stop it is ahead of the one that vLLM has loaded
            self._vllm.update_drafter(spot.serving)
            return spot
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
        if self._vllm is not None and self._wants_eagle3:
            self.engine.read_traces(done.rollouts)
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
            move_vocabulary(
                learner.model, learner.optimizer, vocabulary, self._policy.get_output_embeddings()
            )
        self.spot.replace_model()

    def take_over_drafter(self) -> str | None:
        """The engine drafts with the weights to be served. Returns one line when they are unusable and the
        old ones stay.
        """
        if self.spot is None:
            return None
        broken = first_non_finite(self.spot.serving)
        if broken is not None:
            return f"its {broken} has NaN or infinite values: the last good drafter stays in use"
        if self._vllm is not None:
            self._vllm.update_drafter(self.spot.serving)
            return None
        assert self._drafter is not None
        try:
            self._drafter.load_weights(self.spot.serving)
        except ValueError as error:
            return str(error)
        for name in _WITH_WEIGHTS & self.engine.drafters.keys():
            self.engine.speculation.selector.drafter_changed(name)
        return None
