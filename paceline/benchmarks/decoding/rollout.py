"""Measures decoding speed at 1 to 64 sequences and on a long-tailed GRPO batch, beside its peers.

The engine decodes plainly, with fixed strategies and adaptively. Its peers are transformers' generate, after
``make peers`` vLLM, and at one sequence, after ``make peers-llama``, llama.cpp. A plain decode step is also
timed part by part. Prints tables and writes OUT.json and OUT.png.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from paceline.benchmarks.common.harness import Measurement, RolloutBench, Workload
from paceline.benchmarks.common.peers import LLAMA_PYTHON, PEERS_PYTHON, Peers
from paceline.benchmarks.common.results import Log, Results, RowCallback, ignore_row, json_path
from paceline.benchmarks.common.tables import draw_results, results_table
from paceline.benchmarks.decoding.decode_step import (
    logprob_gap,
    profile_step,
    profile_table,
    refresh_seconds,
)
from paceline.rl.process.console import console
from paceline.rl.process.invocation import command_line
from paceline.rl.process.process_tuning import fit_process
from paceline.rl.recipe import load_config
from paceline.rollout import PLAIN, Strategy

_PROFILED_BATCHES = (1, 4, 16, 32)
_FAMILIES = ("generate", "suffix", "eagle3", "adaptive", "vLLM", "llama.cpp")  # beginnings of methods' names


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--config", required=True, help="recipe of the policy and its task")
    parser.add_argument("--run", type=Path, help="finished run whose policy and drafter are used")
    parser.add_argument("--repeats", type=int, default=2, help="timed passes; the fastest counts")
    parser.add_argument(
        "--tail-cap",
        type=int,
        default=1024,
        help="maximum completion tokens in the long-tailed batch",
    )
    parser.add_argument(
        "--own-problems",
        action="store_true",
        help="decode the recipe's own problems instead of new ones of the same kind",
    )
    parser.add_argument(
        "--workloads", nargs="+", help="numbers of sequences (1, 4, 16, 32, 64) or tail; default: all"
    )
    parser.add_argument(
        "--peers", type=Path, default=PEERS_PYTHON, help="Python interpreter that has vLLM (make peers)"
    )
    parser.add_argument(
        "--llama",
        type=Path,
        default=LLAMA_PYTHON,
        help="Python interpreter that has llama.cpp (make peers-llama)",
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        choices=_FAMILIES,
        default=_FAMILIES,
        help="what to measure beside plain decoding; default: all",
    )
    parser.add_argument(
        "--rounds",
        type=int,
        default=1,
        help="times that every method is measured, one after the other; the fastest counts",
    )
    parser.add_argument("--alone", action="store_true", help="measure the engine only, without peers")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/rollout"), help="JSON file of the results"
    )
    parser.add_argument("overrides", nargs="*", help="recipe overrides, key=value")


def run(args: argparse.Namespace) -> None:
    """Measures decode steps, weight refresh, log-prob gap and decoding speed, and writes the results."""
    fit_process(local_world_size=1)
    terminal = console()

    def log(line: str) -> None:
        terminal.print(line, highlight=False)

    bench = RolloutBench(
        load_config(args.config, args.overrides), args.run, args.repeats, args.tail_cap, args.own_problems
    )
    with Results(args.out, command_line()) as results:
        profiles = []
        for batch in _PROFILED_BATCHES:
            profiles.append(profile_step(bench.policy, batch))
            results.add("profiles", profiles[-1])
        terminal.print(profile_table(profiles))
        refresh = refresh_seconds(bench.policy)
        gap = logprob_gap(bench.policy, bench.workloads(("16",))[0].timed[:32])
        results.note(refresh_seconds=refresh, logprob_gap_mean=gap[0], logprob_gap_max=gap[1])
        terminal.print(
            f"weight refresh {refresh:.3f} s; log-prob gap to the trainer's forward: mean {gap[0]:.4f}, "
            f"largest {gap[1]:.3f}"
        )
        peers = None if args.alone else _peers(bench, args)
        workloads = bench.workloads(args.workloads)
        if peers is not None and "llama.cpp" in args.methods and any(w.slots == 1 for w in workloads):
            build = peers.llama_build()
            results.note(llama_cpp=build)
            log(build or "llama.cpp is left out: it needs make peers-llama, and a plain Llama as the policy")
        _describe(workloads, log)
        rows = []
        for _ in range(args.rounds):
            rows += measure_methods(bench, workloads, peers, log, args.methods, results.into("results"))
        if args.rounds > 1:
            results.put("rounds", rows)
        rows = _fastest(workloads, rows)
        results.put("results", rows)
    terminal.print(results_table(rows))
    draw_results(rows, json_path(args.out).with_suffix(".png"))


def _peers(bench: RolloutBench, args: argparse.Namespace) -> Peers:
    vllm, llama = (python if python.exists() else None for python in (args.peers, args.llama))
    return Peers(bench.policy, bench.path, vllm, llama)


def _describe(workloads: Sequence[Workload], log: Log) -> None:
    for w in workloads:
        lengths = sorted(r.params.max_tokens for r in w.timed)
        log(
            f"{w.name}: {len(lengths)} completions, {sum(lengths)} tokens, median "
            f"{lengths[len(lengths) // 2]}, longest {lengths[-1]}"
        )


def _fastest(workloads: Sequence[Workload], rows: Sequence[Measurement]) -> list[Measurement]:
    """Returns the fastest measurement of each method on each workload, in the order of the workloads."""
    best: dict[tuple[str, str], Measurement] = {}
    for row in sorted(rows, key=lambda m: m.seconds):
        best.setdefault((row.workload, row.method), row)
    methods = list(dict.fromkeys(row.method for row in rows))
    return [best[w.name, m] for w in workloads for m in methods if (w.name, m) in best]


def measure_methods(
    bench: RolloutBench,
    workloads: Sequence[Workload],
    peers: Peers | None,
    log: Log,
    families: Sequence[str] = _FAMILIES,
    on_row: RowCallback = ignore_row,
) -> list[Measurement]:
    """Measures plain decoding and other methods on every workload, beside the peers.

    Args:
        bench: Policy and engines.
        workloads: Requests to decode, see `RolloutBench.workloads`.
        peers: Peers to measure on the same requests; None measures the engine only.
        log: Receives a line per measurement.
        families: What to measure beside plain decoding, as beginnings of names of methods.
        on_row: Called with each measurement once it is there.

    Returns:
        The measurements in the order in which they were made.
    """
    results: list[Measurement] = []

    def report(measurement: Measurement) -> None:
        results.append(measurement)
        on_row(measurement)
        log(_line(measurement))

    for w in workloads:
        if peers is not None and "generate" in families:
            for method, tokens, seconds in peers.generate(w.slots, w.timed, w.warm, bench.repeats):
                report(Measurement(w.name, method, tokens, seconds))
        _measure_engine(bench, w, families, report)
        if peers is not None and "llama.cpp" in families and w.slots == 1:
            for method, tokens, seconds in peers.llama(w.timed, w.warm, bench.repeats):
                report(Measurement(w.name, method, tokens, seconds))
    if peers is not None and "vLLM" in families:
        requests = {w.name: (w.slots, w.timed, w.warm) for w in workloads}
        for name, method, tokens, seconds in peers.vllm(requests, bench.repeats):
            report(Measurement(name, method, tokens, seconds))
    return results


def _measure_engine(
    bench: RolloutBench, w: Workload, families: Sequence[str], report: Callable[[Measurement], None]
) -> None:
    engine = bench.engine(w.slots, max(r.params.max_tokens for r in w.timed))
    strategies: dict[str, Strategy | str] = {"plain": PLAIN, "suffix:4": Strategy("suffix", 4)}
    if bench.drafter is not None:
        strategies |= {"eagle3:3": Strategy("eagle3", 3), "eagle3:4x4/7": Strategy("eagle3", 4, 4, 7)}
    for method, strategy in {**strategies, "adaptive": "adaptive"}.items():
        if method.startswith(("plain", *families)):
            report(bench.measure(w, method, strategy, engine))


def _line(m: Measurement) -> str:
    text = f"{m.workload:>20}  {m.method:<12} {m.tokens_per_second:7.1f} tokens/s"
    if m.acceptance_length is None or m.outside_forwards is None:
        return text
    drafting = f"accepted length {m.acceptance_length:.2f}  drafting {m.draft_ms_per_token:.2f} ms/token"
    return f"{text}  {drafting}  outside forwards {m.outside_forwards:.1%}"
