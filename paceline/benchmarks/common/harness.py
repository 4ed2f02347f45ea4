"""Builds engines and workloads from a recipe and measures decoding: what the decoding benchmarks share."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from paceline.drafter_trainer.storage.checkpoint import load_drafter
from paceline.rl.config.run import RunConfig
from paceline.rl.config.task import DatasetConfig
from paceline.rl.generation.policy_engine import policy_engine
from paceline.rl.models.initial import starting_policy
from paceline.rl.models.loading import load_policy, load_tokenizer
from paceline.rl.tasks.prompts import encode_problem, stable_seed, stop_token_ids
from paceline.rl.tasks.task import Problem, load_task
from paceline.rl.validation.speculation import draft_rules
from paceline.rollout import (
    Request,
    Rollout,
    RolloutEngine,
    SamplingParams,
    Strategy,
    default_tap_layers,
    mean_acceptance_length,
)
from paceline.rollout.drafter_factory import DrafterParts, build_drafter
from paceline.rollout.drafters import EAGLE3_DRAFTERS, DraftRules
from paceline.rollout.drafters.eagle3_model import Eagle3Model

_WITH_MODELS = ("eagle3", "parallel", "clasp", "draft_model")  # drafters that remember no text
# terms of the sums in the long-tailed batch: completions from a dozen tokens to 1,024
_TAIL_TERMS = (2, 2, 3, 4, 6, 12, 40, 110)


@dataclass(frozen=True, slots=True)
class Workload:
    """Holds requests of fixed lengths, so that every method produces the same number of tokens for each.

    Attributes:
        name: Name in tables.
        slots: Number of sequences decoded concurrently.
        timed: Requests that are timed.
        warm: Requests of the warm-up pass; their prompts differ from the timed ones.
    """

    name: str
    slots: int
    timed: list[Request]
    warm: list[Request]


@dataclass(frozen=True, slots=True)
class Measurement:
    """Holds the fastest pass of one method on one workload.

    Attributes:
        workload: Name of the workload.
        method: Name of the method.
        tokens: Number of completion tokens produced.
        seconds: Wall time, drafting and prefill included.
        acceptance_length: Committed tokens per sequence and target forward; None where unknown.
        draft_ms_per_token: Milliseconds spent drafting per committed token.
        outside_forwards: Share of the wall time spent in neither a target forward, the prefill nor the
            drafter; None for peers.
        prefill_seconds: Seconds of the wall time spent on prefill, which speculation does not shorten; None
            for peers.
    """

    workload: str
    method: str
    tokens: int
    seconds: float
    acceptance_length: float | None = None
    draft_ms_per_token: float = 0.0
    outside_forwards: float | None = None
    prefill_seconds: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """The number of completion tokens per second of wall time."""
        return self.tokens / self.seconds


def at_temperature(config: RunConfig, temperature: float) -> RunConfig:
    """Returns a recipe that samples at ``temperature``."""
    return replace(config, rollout=replace(config.rollout, temperature=temperature))


class RolloutBench:
    """Holds one policy and builds workloads and engines for it.

    Args:
        config: Recipe.
        run: Finished run whose trained policy and drafter are used; None takes the recipe's initial policy
            and no EAGLE-3 drafter.
        repeats: Number of timed passes; the fastest counts.
        tail_cap: Maximum number of completion tokens in the long-tailed batch.
        own_problems: Whether to decode the recipe's own problems, as its rollouts do epoch after epoch,
            instead of new problems of the same kind.
    """

    def __init__(
        self,
        config: RunConfig,
        run: Path | None,
        repeats: int,
        tail_cap: int = 1024,
        own_problems: bool = False,
    ) -> None:
        self.config, self.repeats, self.tail_cap = config, repeats, tail_cap
        self.path = starting_policy(config) if run is None else run / "checkpoint" / "policy"
        self.tokenizer = load_tokenizer(self.path)
        self.policy = load_policy(self.path, dtype=torch.bfloat16).eval()
        text = self.policy.config.get_text_config()
        self.drafter = (
            None
            if run is None
            else load_drafter(run / "checkpoint" / "drafter", text.vocab_size, text.hidden_size)
        )
        trained = None if self.drafter is None else self.drafter.config.eagle_aux_hidden_state_layer_ids
        self.taps = default_tap_layers(text.num_hidden_layers) if trained is None else tuple(trained)
        self._parts = DrafterParts(eagle3=self.drafter, composite_match=config.speculation.composite_match)
        self._parts.clasp_skipped = config.speculation.clasp_skipped
        r = config.rollout
        self.stops = stop_token_ids(self.tokenizer, self.policy.generation_config)
        self.params = SamplingParams(r.temperature, r.top_k, r.top_p, r.max_tokens, self.stops)
        self.problems = self._recipe_problems() if own_problems else self._new_problems()

    def _new_problems(self) -> list[Problem]:
        problems = load_task(replace(self.config.task, size=64), seed=987).problems
        return random.Random(0).sample(problems, min(len(problems), 512))  # shuffled, so that sizes mix

    def _recipe_problems(self) -> list[Problem]:
        """Returns the recipe's problems twice, in two orders, so that there are enough for the warm-up.

        The first 40 are timed; the warm-up takes those after them.
        """
        problems = load_task(self.config.task, self.config.seed).problems
        mixed = random.Random(0).sample(problems, min(len(problems), 4096))
        half = len(mixed) // 2
        return [*mixed, *mixed[half:], *mixed[:half]]

    def workloads(self, only: Sequence[str] | None = None) -> list[Workload]:
        """Returns workloads of 1 to 64 sequences of the recipe's task, then a long-tailed GRPO batch.

        Args:
            only: Names of the wanted ones: numbers of sequences, or ``tail``; None returns all.
        """
        shapes = {"1": (1, 24, 1), "4": (4, 32, 4), "16": (16, 64, 8), "32": (32, 64, 8), "64": (64, 96, 8)}
        workloads = []
        for name, (slots, count, samples) in shapes.items():
            if only is not None and name not in only:
                continue
            timed = self.requests(self.problems[:40], count, samples, self.params)
            warm = self.requests(self.problems[40:], slots, samples, self.params)
            workloads.append(
                Workload(name, slots, self.with_natural_lengths(timed), self.with_natural_lengths(warm))
            )
        if only is not None and "tail" not in only:
            return workloads
        params = replace(self.params, max_tokens=self.tail_cap)
        timed = self.with_natural_lengths(self.requests(self._tail_problems(), 64, 8, params))
        warm = self.with_natural_lengths(self.requests(self.problems[40:], 64, 8, self.params))
        return [*workloads, Workload(f"GRPO 8×8, cap {self.tail_cap}", 64, timed, warm)]

    def _tail_problems(self) -> list[Problem]:
        """Returns one sum of each of eight sizes, with completions from a dozen tokens to the cap.

        The two longest sums grow with the cap.
        """
        problems: list[Problem] = []
        for i, terms in enumerate(
            (*_TAIL_TERMS[:-2], *(terms * self.tail_cap // 1024 for terms in _TAIL_TERMS[-2:]))
        ):
            dataset = DatasetConfig(
                "chain_sum", 1, {"min_terms": terms, "max_terms": terms, "min_digits": 1, "max_digits": 1}
            )
            problems += load_task(
                replace(self.config.task, size=1, datasets=(dataset,)), seed=300 + i
            ).problems
        return [replace(p, key=f"tail {i}") for i, p in enumerate(problems)]

    def requests(
        self, problems: Sequence[Problem], count: int, samples: int, params: SamplingParams | None = None
    ) -> list[Request]:
        """Returns ``count`` requests, ``samples`` for each problem.

        Args:
            problems: Problems, used in order and from the start again when they run out.
            count: Number of requests.
            samples: Number of consecutive requests for one problem.
            params: Sampling parameters; None takes the recipe's.
        """
        requests = []
        for i in range(count):
            problem = problems[i // samples % len(problems)]
            prompt = encode_problem(self.tokenizer, problem, self.config.task)
            requests.append(
                Request(prompt, params or self.params, stable_seed(1, 0, problem.key, i), group=problem.key)
            )
        return requests

    def with_natural_lengths(self, requests: Sequence[Request]) -> list[Request]:
        """Returns the requests, each limited to the number of tokens after which it stops by itself.

        The engine decodes them once to find these lengths. Stop tokens are then ignored, so that every
        method produces the same number of tokens.
        """
        engine = self.engine(64, max(r.params.max_tokens for r in requests))
        return [
            replace(
                r.request, params=replace(r.request.params, max_tokens=len(r.token_ids), stop_token_ids=())
            )
            for r in engine.generate(requests)
        ]

    def traced(self, count: int, samples: int) -> list[Rollout]:
        """Decodes ``count`` requests, ``samples`` for each problem, and collects traces for the drafter."""
        engine = self.engine(32, self.params.max_tokens, drafters=("eagle3",), collect_traces=True)
        if "eagle3" in engine.drafters:  # so that some draft tokens are rejected
            engine.use_strategy("eagle3:3")
        return engine.generate(self.requests(self.problems, count, samples))

    def set_draft_model(self, model: PreTrainedModel) -> None:
        """Sets the model of ``draft_model`` drafters in engines built from now on."""
        self._parts.draft_model = model

    def set_drafter(self, drafter: Eagle3Model) -> None:
        """Sets the weights of the EAGLE-3 drafter in engines built from now on."""
        self.drafter = self._parts.eagle3 = drafter

    def eagle3_ways(self) -> list[str]:
        """Returns the drafters that draft with the EAGLE-3 weights: a pass a token, and in one if learned."""
        assert self.drafter is not None
        return ["eagle3"] if self.drafter.mask_token is None else ["eagle3", "parallel"]

    def engine(
        self,
        slots: int,
        max_tokens: int,
        rules: DraftRules | None = None,
        drafters: Sequence[str] | None = None,
        collect_traces: bool = False,
    ) -> RolloutEngine:
        """Returns an engine of this policy.

        Args:
            slots: Number of sequences decoded concurrently.
            max_tokens: Maximum number of completion tokens.
            rules: Rules of draft trees; None takes the recipe's.
            drafters: Names of its drafters; None takes the recipe's. Those that draft with EAGLE-3 are left
                out where the policy has no such drafter.
            collect_traces: Whether to collect the hidden states that drafter training needs.
        """
        s = self.config.speculation
        context = 160 + max_tokens + max(0, max_tokens - 512)  # long sums have long prompts
        engine = policy_engine(
            self.policy,
            max_slots=slots,
            max_context=context,
            max_nodes=s.max_nodes,
            tap_layers=self.taps if self.drafter or collect_traces else (),
            collect_traces=collect_traces,
        )
        self._parts.rules = draft_rules(s) if rules is None else rules
        for name in s.drafters if drafters is None else drafters:
            if self.drafter is not None or name not in EAGLE3_DRAFTERS:
                engine.add_drafter(build_drafter(name, engine, self._parts))
        return engine

    def reset_model_free_drafters(self, engine: RolloutEngine) -> None:
        """Replaces the model-free drafters by new ones, which have not seen the answers to the requests."""
        for name in [name for name in engine.drafters if name not in _WITH_MODELS]:
            engine.drafters[name] = build_drafter(name, engine, self._parts)

    def measure(
        self, w: Workload, method: str, strategy: Strategy | str | None, engine: RolloutEngine
    ) -> Measurement:
        """Measures one method on one workload and returns the fastest of the repeats.

        Args:
            w: Workload.
            method: Name of the method in the result.
            strategy: Strategy to use, after a warm-up pass; None takes the engine as it is, already warm.
            engine: Engine that decodes.
        """
        if strategy is not None:
            engine.use_strategy(strategy)
            engine.generate(w.warm)
        best: Measurement | None = None
        for _ in range(self.repeats):
            self.reset_model_free_drafters(engine)
            begin = time.perf_counter()
            rollouts = engine.generate(w.timed)
            measured = _measurement(w.name, method, engine, rollouts, time.perf_counter() - begin)
            best = measured if best is None or measured.seconds < best.seconds else best
        assert best is not None
        return best


def _measurement(
    workload: str, method: str, engine: RolloutEngine, rollouts: Sequence[Rollout], seconds: float
) -> Measurement:
    tokens = sum(len(r.token_ids) for r in rollouts)
    drafting = sum(r.feedback.draft_seconds for r in engine.records)
    inside = sum(r.feedback.forward_seconds for r in engine.records) + drafting + engine.prefill_seconds
    acceptance = mean_acceptance_length(rollouts)
    return Measurement(
        workload,
        method,
        tokens,
        seconds,
        acceptance,
        drafting / tokens * 1e3,
        1 - inside / seconds,
        engine.prefill_seconds,
    )
