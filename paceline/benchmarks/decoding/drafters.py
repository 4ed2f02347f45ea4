"""Compares every drafter and drafting rule with plain decoding, by temperature and batch size.

``--sharing`` measures instead what sharing a suffix drafter within a group brings, ``--positions 8000`` how
acceptance develops up to that position in long texts.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel

from paceline.benchmarks.common.harness import RolloutBench, Workload, at_temperature
from paceline.benchmarks.common.options import add_policy_options
from paceline.benchmarks.common.results import Log, Results, RowCallback, ignore_row
from paceline.rl.config.run import RunConfig
from paceline.rl.learner.sft_warmup import fine_tune
from paceline.rl.process.invocation import command_line
from paceline.rl.process.process_tuning import fit_process
from paceline.rl.recipe import load_config
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


_SHARING_EPOCHS, _SHARING_SAMPLES = 3, 8
_WINDOWS = (1024, None)  # context windows of EAGLE-3 in long texts; None keeps all tokens


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    add_policy_options(parser, Path("benchmarks/results/drafters"))
    parser.add_argument(
        "--sharing", action="store_true", help="measure the sharing of drafters within groups instead"
    )
    parser.add_argument(
        "--positions", type=int, help="measure acceptance by position, up to this one, instead"
    )


def run(args: argparse.Namespace) -> None:
    """Compares drafters, or measures sharing or long positions where the options say so."""
    fit_process(local_world_size=1)
    config = load_config(args.config)
    with Results(args.out, command_line()) as results:
        on_row = results.into("rows")
        if args.sharing:
            bench = RolloutBench(config, args.run, 1, 64)
            compare_sharing(bench, _SHARING_EPOCHS, _SHARING_SAMPLES, "suffix:4", on_row)
        elif args.positions:
            bench = RolloutBench(config, args.run, 1, 64)
            measure_positions(bench, args.positions, args.positions // 8, _WINDOWS, on_row)
        else:
            compare_drafters(config, args.run, args.temperatures, args.batches, print, on_row)


@dataclass(frozen=True, slots=True)
class DrafterRow:
    """Holds one drafting strategy at one temperature and batch size, beside plain decoding of the requests.

    Attributes:
        temperature: Sampling temperature.
        batch: Number of concurrent sequences.
        strategy: Drafter and shape of its drafts.
        rules: Name of the drafting rules in `RULES`; empty for the default.
        acceptance_length: Committed tokens per sequence and target forward.
        draft_ms_per_token: Milliseconds spent drafting per committed token.
        ratio: Speed relative to plain decoding, all drafting counted.
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
    log: Log,
    on_row: RowCallback = ignore_row,
) -> list[DrafterRow]:
    """Measures the chains and trees of every drafter, then EAGLE-3 under the other rules.

    Args:
        config: Recipe of the run.
        run: Finished run whose policy and drafter are used.
        temperatures: Sampling temperatures.
        batches: Names of workloads, see `RolloutBench.workloads`.
        log: Receives a line per row.
        on_row: Called with each row once it is measured.
    """
    rows = []
    for temperature in temperatures:
        bench = RolloutBench(at_temperature(config, temperature), run, 1, 64)
        bench.set_draft_model(truncated_policy(bench.policy, config, bench.tokenizer, layers=4))
        for w in bench.workloads(batches):
            for row in _rows(bench, w, temperature):
                rows.append(row)
                on_row(row)
                log(
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
    """Returns a small draft model of the policy's first layers, embedding and head, trained like its warm-up.

    Args:
        policy: Policy to truncate.
        config: Recipe whose warm-up trains the draft model.
        tokenizer: Tokenizer of the policy.
        layers: Number of layers to keep.
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
    """Holds the acceptance length of one position within the group, in one epoch over the same prompts.

    Attributes:
        shared: Whether the samples of a group share their suffix drafter.
        epoch: Number of the epoch.
        sample: Position within the group.
        acceptance_length: Committed tokens per sequence and target forward.
    """

    shared: bool
    epoch: int
    sample: int
    acceptance_length: float


def compare_sharing(
    bench: RolloutBench, epochs: int, samples: int, strategy: str, on_row: RowCallback = ignore_row
) -> list[SharingRow]:
    """Decodes the samples of a group one after another and measures what later ones gain from earlier ones.

    Args:
        bench: Policy and its problems; the first eight are decoded.
        epochs: Number of epochs over the problems, each with new seeds.
        samples: Number of samples per problem.
        strategy: Strategy of the suffix drafter.
        on_row: Called with each row once it is measured.
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
                on_row(rows[-1])
    return rows


@dataclass(frozen=True, slots=True)
class PositionRow:
    """Holds the acceptance of one drafter in one stretch of a text.

    Attributes:
        drafter: Name of the drafter.
        window: Context window of EAGLE-3, in tokens; None keeps all.
        until: Position at which the stretch ends.
        tokens_per_step: Committed tokens per sequence and target forward.
        by_level: Probability that each level of a chain is accepted, given that those before it were.
        draft_ms_per_token: Milliseconds spent drafting per committed token.
    """

    drafter: str
    window: int | None
    until: int
    tokens_per_step: float
    by_level: list[float]
    draft_ms_per_token: float


def measure_positions(
    bench: RolloutBench,
    until: int,
    stretch: int,
    windows: Sequence[int | None],
    on_row: RowCallback = ignore_row,
) -> list[PositionRow]:
    """Decodes four long texts with the suffix drafter, and with EAGLE-3 under each context window.

    Args:
        bench: Policy and its problems.
        until: Number of tokens of each text; stop tokens are ignored.
        stretch: Number of tokens that one row covers.
        windows: Context windows of EAGLE-3, in tokens; None keeps all.
        on_row: Called with each row once it is measured.
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
            on_row(row)
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
