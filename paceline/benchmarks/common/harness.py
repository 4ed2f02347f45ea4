"""Decoding speed on a recipe's own prompts: the engine plain, with each drafter and adaptive, beside its
peers.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from paceline.benchmarks.common.peers import Peers
from paceline.benchmarks.common.results import Keep, ignore
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
    PLAIN,
    Request,
    Rollout,
    RolloutEngine,
    SamplingParams,
    Strategy,
    default_tap_layers,
    mean_acceptance_length,
)
from paceline.rollout.drafters import DraftRules
from paceline.rollout.drafters.build import DrafterParts, build_drafter

_TAIL_TERMS = (2, 2, 3, 4, 6, 12, 40, 110)


@dataclass(frozen=True, slots=True)
class Workload:
    """Requests whose lengths are fixed beforehand, so that every method produces the same number of tokens
    for each.

    Attributes:
        name: In tables.
        slots: Sequences decoded together.
        timed, warm: Requests; the warm ones have other prompts.
    """

    name: str
    slots: int
    timed: list[Request]
    warm: list[Request]


@dataclass(frozen=True, slots=True)
class Measurement:
    """One method on one workload: the fastest of the repeats.

    Attributes:
        workload, method: Names.
        tokens: Completion tokens produced.
        seconds: Wall time, drafting and prefill included.
        acceptance_length: Tokens of a sequence a target forward, where known.
        draft_ms_per_token: Time spent drafting, for each committed token.
        prefill_seconds: Of that time, reading prompts: what no speculation shortens.
        outside_forwards: Share of the wall time in neither a target forward nor the drafter; only of the
            engine.
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
        return self.tokens / self.seconds


class RolloutBench:
    """Holds one policy, and builds an engine for each workload.

    Args:
        config: A recipe.
        run: A finished run, for its trained policy and drafter; None takes the recipe's starting policy and
            no EAGLE-3.
        repeats: Timed passes; the fastest counts.
        tail_cap: Most tokens of a completion in the long-tailed batch.
        own_problems: Ask the recipe's own problems, as its rollouts do epoch after epoch, instead of others
            of their kind.
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
        self.problems = self._own_problems() if own_problems else self._other_problems()

    def _other_problems(self) -> list[Problem]:
        problems = load_task(replace(self.config.task, size=64), seed=987).problems
        return random.Random(0).sample(problems, min(len(problems), 512))  # sizes mixed

    def _own_problems(self) -> list[Problem]:
        """Those of the recipe, and once more in another order: what warms up comes after the first 40."""
        problems = load_task(self.config.task, self.config.seed).problems
        mixed = random.Random(0).sample(problems, min(len(problems), 4096))
        half = len(mixed) // 2
        return [*mixed, *mixed[half:], *mixed[:half]]

    def methods(self) -> dict[str, Strategy | str]:
        """Engine strategies by name."""
        named: dict[str, Strategy | str] = {"plain": PLAIN, "suffix:4": Strategy("suffix", 4)}
        if self.drafter is not None:
            named |= {"eagle3:3": Strategy("eagle3", 3), "eagle3:4x4/7": Strategy("eagle3", 4, 4, 7)}
        return {**named, "adaptive": "adaptive"}

    def workloads(self, only: Sequence[str] | None = None) -> list[Workload]:
        """1 to 64 sequences on the recipe's mixture, by number, then a long-tailed GRPO batch, ``tail``; all,
        or those named.
        """
        shapes = {"1": (1, 24, 1), "4": (4, 32, 4), "16": (16, 64, 8), "32": (32, 64, 8), "64": (64, 96, 8)}
        made = []
        for name, (slots, count, samples) in shapes.items():
            if only is not None and name not in only:
                continue
            timed = self.requests(self.problems[:40], count, samples, self.params)
            warm = self.requests(self.problems[40:], slots, samples, self.params)
            made.append(
                Workload(name, slots, self.with_natural_lengths(timed), self.with_natural_lengths(warm))
            )
        if only is not None and "tail" not in only:
            return made
        params = replace(self.params, max_tokens=self.tail_cap)
        timed = self.with_natural_lengths(self.requests(self._tail_problems(), 64, 8, params))
        warm = self.with_natural_lengths(self.requests(self.problems[40:], 64, 8, self.params))
        return [*made, Workload(f"GRPO 8×8, cap {self.tail_cap}", 64, timed, warm)]

    def _tail_problems(self) -> list[Problem]:
        """One sum of each of eight sizes: completions from a dozen tokens to the cap, which the two longest
        grow with.
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
        """``count`` requests, ``samples`` of each problem; ``params`` of None are the recipe's."""
        made = []
        for i in range(count):
            problem = problems[i // samples % len(problems)]
            prompt = encode_problem(self.tokenizer, problem, self.config.task)
            made.append(
                Request(prompt, params or self.params, stable_seed(1, 0, problem.key, i), group=problem.key)
            )
        return made

    def with_natural_lengths(self, requests: Sequence[Request]) -> list[Request]:
        """The same requests, each to be cut after as many tokens as plain decoding gave it before it stopped
        by itself.
        """
        engine = self.engine(64, max(r.params.max_tokens for r in requests))
        return [
            replace(
                r.request, params=replace(r.request.params, max_tokens=len(r.token_ids), stop_token_ids=())
            )
            for r in engine.generate(requests)
        ]

    def give_draft_model(self, model: PreTrainedModel) -> None:
        """Engines made from now on can have a ``draft_model`` drafter."""
        self._parts.draft_model = model

    def engine(
        self,
        slots: int,
        max_tokens: int,
        rules: DraftRules | None = None,
        drafters: Sequence[str] | None = None,
        collect_traces: bool = False,
    ) -> RolloutEngine:
        """An engine with this policy's drafters, or those named; traces are of use to a drafter's
        training.
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
            if self.drafter is not None or name not in ("eagle3", "composite"):
                engine.add_drafter(build_drafter(name, engine, self._parts))
        return engine

    def forget(self, engine: RolloutEngine) -> None:
        """New model-free drafters: ones that have seen a request's answer would be a cheat."""
        for name in [name for name in engine.drafters if name not in ("eagle3", "clasp", "draft_model")]:
            engine.drafters[name] = build_drafter(name, engine, self._parts)

    def run(
        self,
        peers: Peers | None,
        say: Callable[[str], None],
        only: Sequence[str] | None = None,
        keep: Keep = ignore,
    ) -> list[Measurement]:
        """Every method on every workload, or on those named, beside peers where there are any; ``keep`` gets
        each as it comes.
        """
        workloads = self.workloads(only)
        for w in workloads:
            lengths = sorted(r.params.max_tokens for r in w.timed)
            middle = lengths[len(lengths) // 2]
            say(
                f"{w.name}: {len(lengths)} completions, {sum(lengths)} tokens, median {middle}, longest "
                f"{lengths[-1]}"
            )
        results = []
        for w in workloads:
            if peers is not None:
                for method, tokens, seconds in peers.generate(w.slots, w.timed, w.warm, self.repeats):
                    results.append(Measurement(w.name, method, tokens, seconds))
                    keep(results[-1])
                    say(_line(results[-1]))
            engine = self.engine(w.slots, max(r.params.max_tokens for r in w.timed))
            for method, strategy in self.methods().items():
                results.append(self.measure(w, method, strategy, engine))
                keep(results[-1])
                say(_line(results[-1]))
        if peers is not None:
            for name, method, tokens, seconds in peers.vllm(
                {w.name: (w.slots, w.timed, w.warm) for w in workloads}, self.repeats
            ):
                results.append(Measurement(name, method, tokens, seconds))
                keep(results[-1])
                say(_line(results[-1]))
        order = [w.name for w in workloads]
        return sorted(results, key=lambda m: order.index(m.workload))

    def measure(
        self, w: Workload, method: str, strategy: Strategy | str | None, engine: RolloutEngine
    ) -> Measurement:
        """One method on one workload, the fastest of the repeats, after a warm pass. No strategy: the engine
        as it is, warm.
        """
        if strategy is not None:
            engine.use_strategy(strategy)
            engine.generate(w.warm)
        best: Measurement | None = None
        for _ in range(self.repeats):
            self.forget(engine)
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


def _line(m: Measurement) -> str:
    text = f"{m.workload:>20}  {m.method:<12} {m.tokens_per_second:7.1f} tokens/s"
    if m.acceptance_length is None or m.outside_forwards is None:
        return text
    drafting = f"accepted length {m.acceptance_length:.2f}  drafting {m.draft_ms_per_token:.2f} ms/token"
    return f"{text}  {drafting}  outside forwards {m.outside_forwards:.1%}"
