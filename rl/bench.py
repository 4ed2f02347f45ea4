"""Decoding speed on a recipe's own prompts: transformers' generate, the engine plain, with each drafter, and adaptive."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch
from rich.table import Table
from transformers import AutoModelForCausalLM, AutoTokenizer

from drafter_trainer.checkpoint import load_drafter
from rl.config import RunConfig
from rl.prompts import encode_prompt, stop_token_ids
from rl.rollouts import stable_seed
from rl.tasks import load_task
from rl.trainer import starting_policy
from rollout import PLAIN, Request, Rollout, RolloutEngine, SamplingParams, Strategy, default_tap_layers, mean_acceptance_length
from rollout.drafters import Eagle3Drafter, SuffixDrafter

WORKLOADS = {"1": (1, 12, 1), "4": (4, 32, 4), "16": (16, 64, 8), "32": (32, 96, 8), "GRPO batch": (32, 64, 8)}
"""Name → (sequences decoded together, requests, samples of each prompt)."""


@dataclass(frozen=True, slots=True)
class Measurement:
    """One method on one workload: best of the repeats.

    Attributes:
        workload, method: Names.
        tokens: Completion tokens produced.
        seconds: Wall time, drafting and prefill included.
        acceptance_length: Tokens a target forward.
        draft_ms_per_token: Time spent drafting, for each committed token.
    """

    workload: str
    method: str
    tokens: int
    seconds: float
    acceptance_length: float
    draft_ms_per_token: float

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.seconds


class RolloutBench:
    """Holds one policy, and builds an engine for each workload.

    Args:
        config: A recipe.
        run: A finished run, for its trained policy and drafter; None takes the recipe's starting policy and no EAGLE-3.
        repeats: Timed passes; the fastest counts.
    """

    def __init__(self, config: RunConfig, run: Path | None, repeats: int) -> None:
        self.config, self.repeats = config, repeats
        path = starting_policy(config) if run is None else run / "checkpoint" / "policy"
        self.tokenizer = AutoTokenizer.from_pretrained(path)
        self.policy = AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16).eval()
        text = self.policy.config.get_text_config()
        self.taps = default_tap_layers(text.num_hidden_layers)
        self.drafter = None if run is None else load_drafter(run / "checkpoint" / "drafter", text.vocab_size, text.hidden_size)
        r = config.rollout
        stops = stop_token_ids(self.tokenizer, self.policy.generation_config)
        self.params = SamplingParams(r.temperature, r.top_k, r.top_p, r.max_tokens, stops)
        self.problems = load_task(replace(config.task, size=64), seed=987).problems  # not the ones trained on

    def methods(self) -> dict[str, Strategy | str]:
        """Engine strategies by name."""
        named: dict[str, Strategy | str] = {"plain": PLAIN, "suffix:4": Strategy("suffix", 4)}
        if self.drafter is not None:
            named["eagle3:3"] = Strategy("eagle3", 3)
        return {**named, "adaptive": "adaptive"}

    def requests(self, count: int, samples: int, offset: int) -> list[Request]:
        """``count`` requests, ``samples`` of each prompt; ``offset`` chooses other prompts."""
        made = []
        for i in range(count):
            problem = self.problems[(offset + i // samples) % len(self.problems)]
            prompt = encode_prompt(self.tokenizer, problem.question, self.config.task.system)
            made.append(Request(prompt, self.params, stable_seed(1, 0, problem.key, i), group=problem.key))
        return made

    def engine(self, slots: int) -> RolloutEngine:
        """A warm-able engine with this policy's drafters."""
        r = self.config.rollout
        engine = RolloutEngine(
            self.policy,
            max_slots=slots,
            max_context=r.max_context,
            max_depth=r.max_depth,
            tap_layers=self.taps if self.drafter else (),
        )
        engine.add_drafter(SuffixDrafter())
        if self.drafter is not None:
            embed = engine.runner.view.module.get_input_embeddings()
            capacity = engine.capacity_for(r.max_context, r.max_depth)
            engine.add_drafter(Eagle3Drafter(self.drafter, embed, slots=slots, capacity=capacity, dtype=torch.bfloat16))
        return engine

    def run(self, say: Callable[[str], None]) -> list[Measurement]:
        """Every method on every workload."""
        results = []
        for name, (slots, count, samples) in WORKLOADS.items():
            timed, warm = self.requests(count, samples, 0), self.requests(max(count // 2, slots), samples, 40)
            results.append(self._generate(name, slots, timed, warm))
            say(_line(results[-1]))
            engine = self.engine(slots)
            for method, strategy in self.methods().items():
                results.append(self._engine(name, method, strategy, engine, timed, warm))
                say(_line(results[-1]))
        return results

    def _engine(
        self, workload: str, method: str, strategy: Strategy | str, engine: RolloutEngine, timed: list[Request], warm: list[Request]
    ) -> Measurement:
        engine.use_strategy(strategy)
        engine.generate(warm)
        best: tuple[float, list[Rollout], float] | None = None
        for _ in range(self.repeats):
            engine.add_drafter(SuffixDrafter())  # one that has seen these requests' answers would be a cheat
            begin = time.perf_counter()
            rollouts = engine.generate(timed)
            seconds = time.perf_counter() - begin
            if best is None or seconds < best[0]:
                best = seconds, rollouts, sum(r.feedback.draft_seconds for r in engine.records)
        assert best is not None
        seconds, rollouts, drafting = best
        tokens = sum(len(r.token_ids) for r in rollouts)
        return Measurement(workload, method, tokens, seconds, mean_acceptance_length(rollouts), drafting / tokens * 1e3)

    @torch.no_grad()
    def _generate(self, workload: str, slots: int, timed: list[Request], warm: list[Request]) -> Measurement:
        """transformers' generate on batches of ``slots``, left-padded, with its default (SDPA) attention."""
        self._generate_batch(warm[:slots])
        best, tokens = float("inf"), 0
        for _ in range(self.repeats):
            torch.manual_seed(0)
            begin, produced = time.perf_counter(), 0
            for start in range(0, len(timed), slots):
                produced += self._generate_batch(timed[start : start + slots])
            seconds = time.perf_counter() - begin
            if produced / seconds > tokens / best:
                best, tokens = seconds, produced
        return Measurement(workload, "generate", tokens, best, 1.0, 0.0)

    def _generate_batch(self, requests: Sequence[Request]) -> int:
        longest = max(len(r.prompt_ids) for r in requests)
        ids = torch.tensor([[0] * (longest - len(r.prompt_ids)) + list(r.prompt_ids) for r in requests])
        mask = torch.tensor([[0] * (longest - len(r.prompt_ids)) + [1] * len(r.prompt_ids) for r in requests])
        stops = self.params.stop_token_ids
        out = self.policy.generate(
            ids,
            attention_mask=mask,
            do_sample=True,
            temperature=self.params.temperature,
            top_k=self.params.top_k,
            top_p=self.params.top_p,
            max_new_tokens=self.params.max_tokens,
            eos_token_id=list(stops) or None,
            pad_token_id=stops[0] if stops else 0,
        )[:, longest:]
        ended = torch.isin(out, torch.tensor(stops)).long().cumsum(-1)
        return int(((ended == 0) | ((ended == 1) & torch.isin(out, torch.tensor(stops)))).sum())


def _line(m: Measurement) -> str:
    return (
        f"{m.workload:>10}  {m.method:<9} {m.tokens_per_second:7.1f} tokens/s  accepted length {m.acceptance_length:.2f}  "
        f"drafting {m.draft_ms_per_token:.2f} ms/token"
    )


def results_table(results: Sequence[Measurement]) -> Table:
    """Tokens a second, and ratios to generate and to plain."""
    t = Table("sequences", "method", "tokens/s", "÷ generate", "÷ plain", "accepted length", "drafting ms/token")
    by_key = {(m.workload, m.method): m for m in results}
    for m in results:
        generate, plain = by_key[m.workload, "generate"], by_key[m.workload, "plain"]
        t.add_row(
            m.workload,
            m.method,
            f"{m.tokens_per_second:.1f}",
            f"{m.tokens_per_second / generate.tokens_per_second:.2f}",
            f"{m.tokens_per_second / plain.tokens_per_second:.2f}",
            f"{m.acceptance_length:.2f}",
            f"{m.draft_ms_per_token:.2f}",
        )
    return t


def write(results: Sequence[Measurement], out: Path, command: str) -> None:
    """``out``.json with every number and the command, and ``out``.png."""
    machine: dict[str, Any] = {"cpu": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    data = {"command": command, "machine": machine, "torch": torch.__version__, "results": [asdict(m) for m in results]}
    out.with_suffix(".json").write_text(json.dumps(data, indent=2) + "\n")
    methods = list(dict.fromkeys(m.method for m in results))
    workloads = list(dict.fromkeys(m.workload for m in results))
    figure, ax = plt.subplots(figsize=(9, 4), dpi=110)
    width = 0.8 / len(methods)
    plain = {m.workload: m.tokens_per_second for m in results if m.method == "plain"}
    for i, method in enumerate(methods):
        heights = [m.tokens_per_second / plain[m.workload] for m in results if m.method == method]
        ax.bar([x + (i - (len(methods) - 1) / 2) * width for x in range(len(workloads))], heights, width, label=method)
    ax.axhline(1, color="grey", lw=0.8)
    ax.set(xticks=range(len(workloads)), xticklabels=workloads, xlabel="concurrent sequences", ylabel="tokens/s ÷ engine plain")
    ax.legend(ncol=len(methods), fontsize=8)
    figure.tight_layout()
    figure.savefig(out.with_suffix(".png"))
    plt.close(figure)
