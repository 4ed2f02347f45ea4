"""What `launch/bench.py` does for each of its commands.

Each imports what it needs: `gpu` must run where only torch and transformers are.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

from rl.bench_length_commands import LENGTH_COMMANDS
from rl.bench_pipeline_commands import PIPELINE_COMMANDS
from rl.command_line import command_line


def measure_rollout(args: argparse.Namespace) -> None:
    """Decoding speed of one policy, its peers', and where a step's time goes."""
    from rich.console import Console

    from rl.bench import RolloutBench
    from rl.bench_peers import Peers
    from rl.bench_report import profile_table, results_table, write
    from rl.bench_step import logprob_gap, profile_step, refresh_seconds
    from rl.config import load_config
    from rl.machine import fit_process

    fit_process(local_world_size=1)
    console = Console(width=160)
    bench = RolloutBench(load_config(args.config, args.overrides), args.run, args.repeats, args.tail_cap, args.own_problems)
    profiles = [profile_step(bench.policy, batch) for batch in (1, 4, 16, 32)]
    console.print(profile_table(profiles))
    refresh, gap = refresh_seconds(bench.policy), logprob_gap(bench.policy, bench.workloads(("16",))[0].timed[:32])
    console.print(f"weight refresh {refresh:.3f} s; log-prob gap to the trainer's forward: mean {gap[0]:.4f}, largest {gap[1]:.3f}")
    peers = None if args.alone else Peers(bench.policy, bench.path, args.peers if args.peers.exists() else None)
    results = bench.run(peers, lambda line: console.print(line, highlight=False), args.workloads)
    console.print(results_table(results))
    extra = {"refresh_seconds": refresh, "logprob_gap_mean": gap[0], "logprob_gap_max": gap[1]}
    write(results, profiles, extra, args.out, command_line())


def compare_updates(args: argparse.Namespace) -> None:
    """Tokens a second of the update, by method."""
    from rich.console import Console
    from rich.table import Table

    from rl.bench_update import measure_update
    from rl.config import load_config
    from rl.machine import fit_process

    if not args.untuned:
        fit_process(local_world_size=1)
    results = measure_update(load_config(args.config))
    table = Table("method", "tokens/s", "÷ padded", "share of the machine's operations a second")
    for m in results:
        row = (f"{m.tokens / m.seconds:.0f}", f"{results[0].seconds / m.seconds:.2f}", f"{m.bound / m.seconds:.0%}")
        table.add_row(m.method, *row)
    Console().print(table)


def compare_runs(args: argparse.Namespace) -> None:
    """Reward, rise and speed of finished runs, as a table and as JSON."""
    from rich.console import Console
    from rich.table import Table

    from rl.summary import read_metrics, summarise

    table = Table("run", "seed", "first quarter", "last quarter", "rise ÷ its standard error", "rollout ÷ plain", "peak GB")
    records = []
    for run in args.runs:
        s = {"seed": json.loads((run / "config.json").read_text())["seed"], **summarise(read_metrics(run))}
        records.append(s)
        ratio = (s["reward_after"] - s["reward_before"]) / s["reward_rise_std_error"]
        row = (s["reward_before"], s["reward_after"], ratio, s.get("rollout_speedup", float("nan")), s["peak_memory_gb"])
        table.add_row(run.name, str(s["seed"]), *(f"{x:.3f}" for x in row))
    Console().print(table)
    args.out.write_text(json.dumps({"command": command_line(), "runs": records}, indent=2) + "\n")


def measure_gpu(args: argparse.Namespace) -> None:
    """One GPU: graphs, steps, verification and drafting."""
    import torch

    from rl.bench_gpu import measure, write_gpu
    from rl.errors import UserError

    if not torch.cuda.is_available():
        raise UserError("bench.py gpu: no CUDA device is visible; run it on a machine with one")
    reports = []
    for shape in args.shapes:
        reports.append(measure(shape, lambda line: print(line, flush=True)))
        for name, value in reports[-1].graph_memory.items():
            print(f"{shape}: {name}: {value / 1e6:.0f} MB" if value > 1000 else f"{shape}: {name}: {value:.3f}", flush=True)
        for batch, milliseconds, share in reports[-1].drafter:
            print(f"{shape}: a draft step at batch {batch}: {milliseconds:.2f} ms, {share:.1%} of a decode step", flush=True)
        write_gpu(reports, args.out, command_line())


def print_plans(args: argparse.Namespace) -> None:
    """Planned bytes of graphs."""
    from rl.bench_gpu import SHAPES, planned

    for shape in SHAPES:
        count, bucketed, naive = planned(shape)
        print(f"{shape}: {count} graphs, {bucketed / 1e6:.0f} MB bucketed, {naive / 1e6:.0f} MB naive: {bucketed / naive:.2f}")


def compare_drafters(args: argparse.Namespace) -> None:
    """Drafters by temperature and batch, by sharing, or by position."""
    from rl.bench import RolloutBench
    from rl.bench_drafting import compare_drafters, compare_sharing, measure_positions
    from rl.bench_report import write_rows
    from rl.config import load_config
    from rl.machine import fit_process

    fit_process(local_world_size=1)
    config = load_config(args.config)
    if args.sharing:
        rows: list = compare_sharing(RolloutBench(config, args.run, 1, 64), epochs=3, samples=8, strategy="suffix:4")
    elif args.positions:
        rows = measure_positions(RolloutBench(config, args.run, 1, 64), args.positions, args.positions // 8, (1024, None))
    else:
        rows = compare_drafters(config, args.run, args.temperatures, args.batches, print)
    write_rows({"rows": rows}, args.out, command_line())


def compare_verifiers(args: argparse.Namespace) -> None:
    """Verifiers in the engine, their theory and their bounds."""
    from dataclasses import replace

    from rl.bench import RolloutBench
    from rl.bench_report import write_rows
    from rl.bench_verifiers import measure_verifiers
    from rl.config import load_config
    from rl.machine import fit_process

    fit_process(local_world_size=1)
    config = load_config(args.config)
    tables: dict[str, list] = {}
    for temperature in args.temperatures:
        bench = RolloutBench(replace(config, rollout=replace(config.rollout, temperature=temperature)), args.run, 1, 64)
        rows, bounds = measure_verifiers(bench, args.batches[-1], pairs=96, candidates=(1, 2, 3, 4), say=print)
        tables |= {f"verifiers, T = {temperature}": rows, f"bounds, T = {temperature}": bounds}
    write_rows(tables, args.out, command_line())


def compare_selection(args: argparse.Namespace) -> None:
    """The bandit against exhaustive search, and on whole batches."""
    from dataclasses import replace

    from rl.bench import RolloutBench
    from rl.bench_report import write_rows
    from rl.bench_selection import compare_selection, measure_whole_batch
    from rl.config import load_config
    from rl.machine import fit_process

    fit_process(local_world_size=1)
    config = load_config(args.config)
    tables: dict[str, list] = {}
    for temperature in args.temperatures:
        warm = replace(config, rollout=replace(config.rollout, temperature=temperature))
        bench = RolloutBench(warm, args.run, 1, args.tail_cap)
        tables[f"selection, T = {temperature}"] = compare_selection(bench, args.batches, print)
        if not args.whole_batch:
            continue
        whole = measure_whole_batch(bench, bench.workloads(("tail",))[0])
        print(f"{whole.workload}: {whole.ratio:.2f} x plain of at most {whole.bound:.2f}")
        tables[f"whole batch, T = {temperature}"] = [whole]
    write_rows(tables, args.out, command_line())


def compare_served(args: argparse.Namespace) -> None:
    """The exported drafter in vLLM."""
    from rl.bench import RolloutBench
    from rl.bench_report import write_rows
    from rl.bench_served import compare_served
    from rl.config import load_config
    from rl.machine import fit_process

    fit_process(local_world_size=1)
    row = compare_served(RolloutBench(load_config(args.config), args.run, 1, 64), args.peers, args.prompts, args.depth)
    print(
        f"acceptance length over {row.prompts} prompts, greedy, chains of {row.depth}: engine {row.engine:.3f}, vLLM {row.vllm:.3f}"
    )
    print(f"vLLM / engine {row.ratio:.3f}")
    write_rows({"rows": [row]}, args.out, command_line())


def compare_losses(args: argparse.Namespace) -> None:
    """Distillation losses by second of training."""
    from rl.bench import RolloutBench
    from rl.bench_losses import collection_cost, compare_losses
    from rl.bench_report import write_rows
    from rl.config import load_config
    from rl.machine import fit_process

    fit_process(local_world_size=1)
    bench = RolloutBench(load_config(args.config), args.run, 1, 64)
    cost = collection_cost(bench, passes=3)
    print(f"collecting traces: {cost.share:.1%} of rollout time")
    rows = compare_losses(bench, args.seconds, args.sequences, print)
    write_rows({"collection": [cost], "rows": rows}, args.out, command_line())


def compare_idle(args: argparse.Namespace) -> None:
    """Training on idle ranks against a frozen drafter."""
    from rl.bench_idle import compare_idle
    from rl.bench_report import write_rows

    frozen, trained = rows = compare_idle(args.config, args.overrides, args.start, args.runs, args.ranks, print)
    print(f"step with training / without: {trained.step / frozen.step:.3f}; rollouts {trained.rollout / frozen.rollout:.3f}")
    print(f"paired by step: {trained.longer:+.1%} ± {trained.longer_error:.1%}; the update, which training cannot touch: ", end="")
    print(f"{trained.update_longer:+.1%}; a snapshot takes {1e3 * trained.snapshot:.0f} ms of a step")
    write_rows({"rows": rows}, args.out, command_line())


def compare_learning(args: argparse.Namespace) -> None:
    """Finished runs with speculation beside such without."""
    from rl.bench_learning import compare_learning, learning_row
    from rl.bench_report import write_rows

    speculating, plain = ([learning_row(run) for run in runs] for runs in (args.speculating, args.plain))
    found = compare_learning(speculating, plain)
    for row in (*speculating, *plain):
        print(f"{row.run}: reward {row.reward:.3f}, length {row.length:.1f}, rollouts {row.rollout:.0f} s, steps {row.step:.0f} s")
    print(f"with speculation: reward {found.reward_difference:+.3f} ± {found.reward_error:.3f}", end=", ")
    print(f"length {found.length_difference:+.1f} ± {found.length_error:.1f}")
    print(
        f"rollouts {found.rollout_ratio:.2f}x, steps {found.step_ratio:.2f}x of {found.bound:.2f}x (Amdahl, at this rollout ratio)"
    )
    print(f"{found.limit:.2f}x would be the steps' ratio if rollouts took no time")
    tables: dict[str, list] = {"runs": [*speculating, *plain], "comparison": [found]}
    write_rows(tables, args.out, command_line())


def compare_sharding(args: argparse.Namespace) -> None:
    """A recipe in every way that weights can lie."""
    from rl.bench_report import write_rows
    from rl.bench_sharding import compare_sharding

    rows = compare_sharding(args.config, args.overrides, args.runs, args.ranks, print)
    write_rows({"rows": rows}, args.out, command_line())


def compare_online(args: argparse.Namespace) -> None:
    """Online learners beside each other on one moving policy."""
    from rl.bench_online import compare_online
    from rl.bench_report import write_rows
    from rl.config import load_config
    from rl.machine import fit_process

    fit_process(local_world_size=1)
    rows = compare_online(load_config(args.config, args.overrides), args.start, args.seconds, args.runs, print)
    for row in rows:
        mean = sum(row.lengths) / len(row.lengths)
        print(f"{row.variant:<50} {row.updates:>4} updates  mean length {mean:.3f}  regret {row.regret[-1]:+.2f}")
    write_rows({"rows": rows}, args.out, command_line())


def draw_plots(args: argparse.Namespace) -> None:
    """Pictures beside the JSON files."""
    from rl.bench_plots import draw_all

    for path in draw_all(Path("benchmarks")):
        print(path)


def compare_speculation_end_to_end(args: argparse.Namespace) -> None:
    """The recipe plainly and adaptively."""
    from dataclasses import asdict

    from rl.bench_speculation import compare_speculation
    from rl.config import load_config
    from rl.warmup import warm_up

    config = load_config(args.config, args.overrides)
    if config.policy.warmup is not None:
        warm_up(config)
    plain, adaptive = compare_speculation(args.config, args.overrides, args.runs)
    ratios = {"rollout": plain.rollout / adaptive.rollout, "step": plain.step / adaptive.step}
    bound = plain.step / (plain.step - plain.rollout)
    for times in (plain, adaptive):
        print(times)
    print(f"rollout {ratios['rollout']:.2f}x, whole step {ratios['step']:.2f}x of at most {bound:.2f}x (Amdahl)")
    record = {
        "command": command_line(),
        "runs": [asdict(plain), asdict(adaptive)],
        "ratios": ratios,
        "bound": bound,
    }
    args.out.write_text(json.dumps(record, indent=2) + "\n")


COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "rollout": measure_rollout,
    "update": compare_updates,
    "seeds": compare_runs,
    "gpu": measure_gpu,
    "plan": print_plans,
    "drafters": compare_drafters,
    "verifiers": compare_verifiers,
    "selection": compare_selection,
    "plots": draw_plots,
    "served": compare_served,
    "idle": compare_idle,
    "online": compare_online,
    "learning": compare_learning,
    "sharding": compare_sharding,
    "losses": compare_losses,
    "gpu-rl": compare_speculation_end_to_end,
    **LENGTH_COMMANDS,
    **PIPELINE_COMMANDS,
}
