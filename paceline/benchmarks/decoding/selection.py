"""Compares the bandit with every fixed strategy, and speculation on whole batches with Amdahl's bound."""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median

from paceline.benchmarks.common.harness import Measurement, RolloutBench, Workload, at_temperature
from paceline.benchmarks.common.options import add_policy_options
from paceline.benchmarks.common.results import Log, Results, RowCallback, ignore_row
from paceline.rl.process.invocation import command_line
from paceline.rl.process.process_tuning import fit_process
from paceline.rl.recipe import load_config
from paceline.rollout import PLAIN, RolloutEngine, Strategy
from paceline.rollout.strategy import FixedSelector, Selector, default_arms

_MIN_WARMUP_STEPS = 200  # decode steps that the bandit sees before it is measured
_FINALISTS, _FINAL_PASSES = 3, 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    add_policy_options(parser, Path("benchmarks/results/selection"))
    parser.add_argument(
        "--whole-batch",
        action="store_true",
        help="also decode the long-tailed GRPO batch plainly and adaptively",
    )
    parser.add_argument(
        "--tail-cap",
        type=int,
        default=1024,
        help="maximum completion tokens in the long-tailed batch",
    )


def run(args: argparse.Namespace) -> None:
    """Compares the bandit with exhaustive search, and measures whole batches, at each temperature."""
    fit_process(local_world_size=1)
    config = load_config(args.config)
    with Results(args.out, command_line()) as results:
        for temperature in args.temperatures:
            bench = RolloutBench(at_temperature(config, temperature), args.run, 1, args.tail_cap)
            compare_selection(bench, args.batches, print, results.into(f"selection, T = {temperature}"))
            if args.whole_batch:
                row = measure_whole_batch(bench, bench.workloads(("tail",))[0])
                print(f"{row.workload}: {row.ratio:.2f} x plain of at most {row.bound:.2f}")
                results.add(f"whole batch, T = {temperature}", row)


@dataclass(frozen=True, slots=True)
class SelectionRow:
    """Holds one batch size: every fixed strategy once, then the best of them and the bandit in turn.

    The fastest of many single passes is also the luckiest, so the best three are measured again, as often as
    the bandit and in alternation with it.

    Attributes:
        batch: Number of concurrent sequences.
        search: Tokens per second of every fixed strategy, one pass each.
        finals: Tokens per second of plain decoding, of the best three of the search and of the bandit
            (``adaptive``), three passes each.
        chosen: Number of steps for which the bandit chose each strategy, in its last pass.
    """

    batch: str
    search: dict[str, float]
    finals: dict[str, list[float]]
    chosen: dict[str, int] = field(default_factory=dict)

    def speed(self, method: str) -> float:
        """Returns the median tokens per second of the final passes, one of which other jobs may slow down."""
        return median(self.finals[method])

    @property
    def best(self) -> str:
        """The fastest fixed strategy."""
        return max((name for name in self.finals if name != "adaptive"), key=self.speed)

    @property
    def share_of_best(self) -> float:
        """The bandit's speed relative to the best fixed strategy."""
        return self.speed("adaptive") / self.speed(self.best)

    @property
    def over_plain(self) -> float:
        """The bandit's speed relative to plain decoding."""
        return self.speed("adaptive") / self.speed("plain")


def compare_selection(
    bench: RolloutBench, batches: list[str], log: Log, on_row: RowCallback = ignore_row
) -> list[SelectionRow]:
    """Searches the default arms exhaustively at each batch size, then measures the bandit.

    The bandit is measured once it has seen 200 steps of other requests.

    Args:
        bench: Policy, workloads and engines.
        batches: Names of workloads, see `RolloutBench.workloads`.
        log: Receives a line per row.
        on_row: Called with each row once it is measured.
    """
    rows = []
    for w in bench.workloads(batches):
        engine = bench.engine(w.slots, max(r.params.max_tokens for r in w.timed))
        arms = [PLAIN, *(arm for name in engine.drafters for arm in default_arms(name, engine.max_nodes))]
        search = {str(arm): bench.measure(w, str(arm), arm, engine).tokens_per_second for arm in arms}
        best = sorted(search, key=search.__getitem__, reverse=True)[:_FINALISTS]
        bandit = _warmed_up_bandit(bench, w, engine)
        finals: dict[str, list[float]] = {name: [] for name in dict.fromkeys(("plain", *best, "adaptive"))}
        chosen: Counter[str] = Counter()
        for _ in range(_FINAL_PASSES):
            for name, speeds in finals.items():
                engine.speculation.selector = (
                    bandit if name == "adaptive" else FixedSelector(Strategy.parse(name))
                )
                speeds.append(bench.measure(w, name, None, engine).tokens_per_second)
            chosen = Counter(r.strategy for r in engine.records)
        row = SelectionRow(w.name, search, finals, dict(chosen))
        log(
            f"{w.name:>3}: best {row.best} {row.speed(row.best):.1f} tokens/s, bandit "
            f"{row.speed('adaptive'):.1f} "
            f"({row.share_of_best:.1%} of it, {row.over_plain:.2f} x plain)"
        )
        rows.append(row)
        on_row(row)
    return rows


def _warmed_up_bandit(bench: RolloutBench, w: Workload, engine: RolloutEngine) -> Selector:
    engine.use_strategy("adaptive")
    seen = passes = 0
    # drafters that have seen a text before would always be right and mislead the bandit
    while seen < _MIN_WARMUP_STEPS:
        bench.reset_model_free_drafters(engine)
        engine.generate([replace(r, seed=r.seed + passes) for r in w.warm])
        seen, passes = seen + len(engine.records), passes + 1
    return engine.speculation.selector


@dataclass(frozen=True, slots=True)
class AmdahlRow:
    """Holds the times of a whole batch and the most that speculation could gain on it.

    Attributes:
        workload: Name of the workload.
        plain_seconds: Wall time of plain decoding.
        adaptive_seconds: Wall time of adaptive decoding.
        ratio: Plain time relative to adaptive time.
        bound: Plain time relative to what would be left if every decode forward committed a whole draft of
            ``max_nodes`` tokens at the cost of a plain one: the prefill and 1 / (max_nodes + 1) of the
            decoding.
        tail_ratio: Plain time relative to adaptive time while at most four sequences are active; None where
            either never had so few.
    """

    workload: str
    plain_seconds: float
    adaptive_seconds: float
    ratio: float
    bound: float
    tail_ratio: float | None


def measure_whole_batch(bench: RolloutBench, w: Workload) -> AmdahlRow:
    """Decodes a long-tailed batch plainly and adaptively, twice in turn, and compares the faster passes."""
    engine = bench.engine(w.slots, max(r.params.max_tokens for r in w.timed))
    engine.use_strategy("adaptive")
    selectors = {"adaptive": engine.speculation.selector, "plain": FixedSelector(PLAIN)}
    best: dict[str, tuple[Measurement, float]] = {}
    engine.generate(w.warm)
    for _ in range(2):
        for name, selector in selectors.items():
            engine.speculation.selector = selector
            measured = bench.measure(w, name, None, engine)
            if name not in best or measured.seconds < best[name][0].seconds:
                best[name] = measured, _tail_seconds(engine)
    (plain, tail_plain), (adaptive, tail) = best["plain"], best["adaptive"]
    assert plain.prefill_seconds is not None
    least = plain.prefill_seconds + (plain.seconds - plain.prefill_seconds) / (engine.max_nodes + 1)
    tail_ratio = tail_plain / tail if tail_plain > 0 and tail > 0 else None
    return AmdahlRow(
        w.name,
        plain.seconds,
        adaptive.seconds,
        plain.seconds / adaptive.seconds,
        plain.seconds / least,
        tail_ratio,
    )


def _tail_seconds(engine: RolloutEngine) -> float:
    return sum(r.feedback.total_seconds for r in engine.records if r.active <= 4)
