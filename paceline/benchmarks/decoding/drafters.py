"""Drafters side by side: every one at several temperatures and batches, sharing within groups, and long
positions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from paceline.benchmarks.common.harness import RolloutBench, Workload
from paceline.benchmarks.common.results import Keep, ignore
from paceline.rl.config.run import RunConfig
from paceline.rl.learner.sft_warmup import fine_tune
from paceline.rl.tasks.prompts import stable_seed
from paceline.rollout import PLAIN, Request, RolloutEngine, Strategy, mean_acceptance_length
from paceline.rollout.drafters import DraftRules, Eagle3Drafter, SuffixDrafter

STRATEGIES = {
    "suffix": ("suffix:4", "suffix:4x3/8"),
    "ngram": ("ngram:4",),
    "consensus": ("consensus:4", "consensus:4x2/8"),
    "recycling": ("recycling:3", "recycling:4x4/12"),
    "stand": ("stand:3", "stand:4x4/12"),
    "eagle3": ("eagle3:3", "eagle3:4x4/7", "eagle3:6x4/15"),
    "composite": ("composite:3", "composite:6x4/15"),
    "clasp": ("clasp:2",),
    "draft_model": ("draft_model:3", "draft_model:4x3/8"),
}
RULES = {
    "opt_tree": (DraftRules("opt_tree", gain=0.05), ("eagle3:6x4/12",)),
    "svip 0.6": (DraftRules(stop="svip", stop_threshold=0.6), ("eagle3:6",)),
    "svip 1.0": (DraftRules(stop="svip", stop_threshold=1.0), ("eagle3:6",)),
    "specdec 0.5": (DraftRules(stop="specdec", stop_threshold=0.5), ("eagle3:6",)),
    "drawn": (DraftRules("static", "replacement"), ("eagle3:3",)),
    "drawn, without replacement": (DraftRules("static", "without_replacement"), ("eagle3:4x4/12",)),
    "dyspec": (DraftRules("dyspec", "without_replacement"), ("eagle3:5x4/12",)),
}


@dataclass(frozen=True, slots=True)
class DrafterRow:
    """One way to draft at one temperature and batch: against plain decoding of the same requests, all
    drafting counted.
    """

    temperature: float
    batch: str
    strategy: str
    rules: str
    acceptance_length: float
    draft_ms_per_token: float
    ratio: float


def compare_drafters(
    config: RunConfig,
    run: Path,
    temperatures: Sequence[float],
    batches: Sequence[str],
    say: Callable[[str], None],
    keep: Keep = ignore,
) -> list[DrafterRow]:
    """Every drafter's chains and trees, then EAGLE-3 under other rules; each row is handed to ``keep`` as it
    comes.
    """
    rows = []
    for temperature in temperatures:
        bench = RolloutBench(
            replace(config, rollout=replace(config.rollout, temperature=temperature)), run, 1, 64
        )
        bench.give_draft_model(truncated_policy(bench.policy, config, bench.tokenizer, layers=4))
        for w in bench.workloads(batches):
            for row in _rows(bench, w, temperature):
                rows.append(row)
                keep(row)
                say(
                    f"T {temperature}  {w.name:>3}  {row.strategy:<18} {row.rules:<26} accepted "
                    f"{row.acceptance_length:.2f}  "
                    f"drafting {row.draft_ms_per_token:.2f} ms/token  {row.ratio:.2f} x plain"
                )
    return rows


def _rows(bench: RolloutBench, w: Workload, temperature: float) -> Iterator[DrafterRow]:
    longest = max(r.params.max_tokens for r in w.timed)
    plain = bench.measure(w, "plain", PLAIN, bench.engine(w.slots, longest, drafters=()))
    cases: list[tuple[str, DraftRules, tuple[str, ...], tuple[str, ...]]] = []
    for name, strategies in STRATEGIES.items():
        needs: tuple[str, ...] = ("suffix", "eagle3", "composite") if name == "composite" else (name,)
        cases.append(("", DraftRules(), strategies, needs))
    cases += [(name, rules, strategies, ("eagle3",)) for name, (rules, strategies) in RULES.items()]
    for rules_name, rules, strategies, needs in cases:
        engine = bench.engine(w.slots, longest, rules, needs)
        for text in strategies:
            m = bench.measure(w, text, text, engine)
            assert m.acceptance_length is not None and m.draft_ms_per_token is not None
            ratio = m.tokens_per_second / plain.tokens_per_second
            yield DrafterRow(
                temperature, w.name, text, rules_name, m.acceptance_length, m.draft_ms_per_token, ratio
            )


def truncated_policy(
    policy: PreTrainedModel, config: RunConfig, tokenizer: object, layers: int
) -> PreTrainedModel:
    """A small draft model of the policy's vocabulary: its first layers, its embedding and head, trained like
    its warm-up.
    """
    small_config = copy.deepcopy(policy.config)
    small_config.num_hidden_layers = layers
    if getattr(small_config, "layer_types", None):
        small_config.layer_types = small_config.layer_types[:layers]
    small = type(policy)(small_config).float()
    small.load_state_dict(policy.state_dict(), strict=False)
    warm = replace(config, policy=replace(config.policy, gradient_checkpointing=False))
    with torch.enable_grad():
        fine_tune(warm, small, tokenizer, None)
    return small.eval().requires_grad_(False)


@dataclass(frozen=True, slots=True)
class SharingRow:
    """Acceptance length of one group position in one epoch over the same prompts."""

    shared: bool
    epoch: int
    sample: int
    acceptance_length: float


def compare_sharing(
    bench: RolloutBench, epochs: int, samples: int, strategy: str, keep: Keep = ignore
) -> list[SharingRow]:
    """Samples of a group one after another, over several epochs with new seeds: what earlier ones leave for
    later ones.
    """
    problems = bench.problems[:8]
    rows = []
    for shared in (True, False):
        engine = bench.engine(len(problems), bench.params.max_tokens, drafters=())
        engine.add_drafter(SuffixDrafter(shared=shared))
        engine.use_strategy(strategy)
        for epoch in range(epochs):
            for sample in range(samples):
                requests = [
                    replace(r, seed=stable_seed(7, epoch, str(r.group), sample))
                    for r in bench.requests(problems, len(problems), 1)
                ]
                rows.append(
                    SharingRow(shared, epoch, sample, mean_acceptance_length(engine.generate(requests)))
                )
                keep(rows[-1])
    return rows


@dataclass(frozen=True, slots=True)
class PositionRow:
    """Acceptance of one drafter in one stretch of a text, by level of its chains: P(level | those above)."""

    drafter: str
    window: int | None
    until: int
    tokens_per_step: float
    by_level: list[float]
    draft_ms_per_token: float


def measure_positions(
    bench: RolloutBench, until: int, stretch: int, windows: Sequence[int | None], keep: Keep = ignore
) -> list[PositionRow]:
    """Four texts of ``until`` tokens (stop tokens ignored), drafted by EAGLE-3 with each window, and by the
    suffix drafter.
    """
    rows: list[PositionRow] = []
    params = replace(bench.params, max_tokens=until, stop_token_ids=())
    for name, window in [("suffix", None), *(("eagle3", window) for window in windows)]:
        requests = [
            replace(r, params=replace(params, max_tokens=until))
            for r in bench.requests(bench.problems[:4], 4, 1)
        ]
        engine = bench.engine(4, until, drafters=() if name == "eagle3" else (name,))
        if name == "eagle3":
            engine.add_drafter(_eagle3(bench, engine, window))
        engine.use_strategy(Strategy(name, 3))
        for row in _stretches(name, window, engine, requests, stretch):
            rows.append(row)
            keep(row)
    return rows


def _eagle3(bench: RolloutBench, engine: RolloutEngine, window: int | None) -> Eagle3Drafter:
    assert bench.drafter is not None
    embed = engine.runner.view.module.get_input_embeddings()
    capacity = engine.capacity_for(engine.max_context, engine.max_nodes)
    return Eagle3Drafter(
        bench.drafter, embed, slots=4, capacity=capacity, dtype=torch.bfloat16, window=window
    )


def _stretches(
    name: str, window: int | None, engine: RolloutEngine, requests: Sequence[Request], stretch: int
) -> Iterator[PositionRow]:
    engine.generate(requests)
    last = max(r.feedback.context for r in engine.records)
    for end in range(stretch, last + stretch, stretch):
        records = [
            r
            for r in engine.records
            if end - stretch <= r.feedback.context < end and r.feedback.active == len(requests)
        ]
        if not records:
            continue
        accepted = [a for r in records for a in r.feedback.accepted]
        drafted = [d for r in records for d in r.feedback.drafted]
        levels = []
        for i in range(3):
            reached = sum(a >= i and d > i for a, d in zip(accepted, drafted, strict=True))
            levels.append(sum(a > i for a in accepted) / reached if reached else 0.0)
        tokens = sum(r.committed for r in records)
        milliseconds = sum(r.feedback.draft_seconds for r in records) / tokens * 1e3
        yield PositionRow(name, window, end, tokens / len(accepted), levels, milliseconds)
