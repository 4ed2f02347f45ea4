"""What `launch/bench.py` does for each of its commands.

Each imports what it needs: `gpu` must run where only torch and transformers are.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from paceline.benchmarks.length_commands import LENGTH_COMMANDS
from paceline.benchmarks.pipeline_commands import PIPELINE_COMMANDS
from paceline.rl.process.invocation import command_line


def measure_rollout(args: argparse.Namespace) -> None:
    """Decoding speed of one policy, its peers', and where a step's time goes."""
    from paceline.benchmarks.common.harness import RolloutBench
    from paceline.benchmarks.common.peers import Peers
    from paceline.benchmarks.common.results import Results, json_path
    from paceline.benchmarks.common.tables import draw_results, profile_table, results_table
    from paceline.benchmarks.decoding.decode_step import logprob_gap, profile_step, refresh_seconds
    from paceline.rl.process.console import console
    from paceline.rl.process.process_tuning import fit_process
    from paceline.rl.recipe import load_config

    fit_process(local_world_size=1)
    terminal = console()
    bench = RolloutBench(
        load_config(args.config, args.overrides), args.run, args.repeats, args.tail_cap, args.own_problems
    )
    with Results(args.out, command_line()) as results:
        profiles = []
        for batch in (1, 4, 16, 32):
            profiles.append(profile_step(bench.policy, batch))
            results.add("profiles", profiles[-1])
        terminal.print(profile_table(profiles))
        refresh, gap = (
            refresh_seconds(bench.policy),
            logprob_gap(bench.policy, bench.workloads(("16",))[0].timed[:32]),
        )
        results.note(refresh_seconds=refresh, logprob_gap_mean=gap[0], logprob_gap_max=gap[1])
        terminal.print(
            f"weight refresh {refresh:.3f} s; log-prob gap to the trainer's forward: mean {gap[0]:.4f}, "
            f"largest {gap[1]:.3f}"
        )
        peers = (
            None
            if args.alone
            else Peers(bench.policy, bench.path, args.peers if args.peers.exists() else None)
        )
        rows = bench.run(
            peers, lambda line: terminal.print(line, highlight=False), args.workloads, results.into("results")
        )
        results.put("results", rows)  # in the order of the workloads
    terminal.print(results_table(rows))
    draw_results(rows, json_path(args.out).with_suffix(".png"))


def compare_updates(args: argparse.Namespace) -> None:
    """Tokens a second of the update, by method."""
    from rich.table import Table

    from paceline.benchmarks.training.update import measure_update
    from paceline.rl.process.console import console
    from paceline.rl.process.process_tuning import fit_process
    from paceline.rl.recipe import load_config

    if not args.untuned:
        fit_process(local_world_size=1)
    results = measure_update(load_config(args.config))
    table = Table("method", "tokens/s", "÷ padded", "share of the machine's operations a second")
    for m in results:
        row = (
            f"{m.tokens / m.seconds:.0f}",
            f"{results[0].seconds / m.seconds:.2f}",
            f"{m.bound / m.seconds:.0%}",
        )
        table.add_row(m.method, *row)
    console().print(table)


def compare_runs(args: argparse.Namespace) -> None:
    """Reward, rise and speed of finished runs, as a table and as JSON."""
    from rich.table import Table

    from paceline.benchmarks.common.results import Results
    from paceline.rl.monitoring.summary import read_metrics, summarise
    from paceline.rl.process.console import console
    from paceline.rl.process.files import read_object

    table = Table(
        "run",
        "seed",
        "first quarter",
        "last quarter",
        "rise ÷ its standard error",
        "rollout ÷ plain",
        "peak GB",
    )
    records = []
    for run in args.runs:
        s = {"seed": read_object(run / "config.json")["seed"], **summarise(read_metrics(run))}
        records.append(s)
        ratio = (s["reward_after"] - s["reward_before"]) / s["reward_rise_std_error"]
        row = (
            s["reward_before"],
            s["reward_after"],
            ratio,
            s.get("rollout_speedup", float("nan")),
            s["peak_memory_gb"],
        )
        table.add_row(run.name, str(s["seed"]), *(f"{x:.3f}" for x in row))
    console().print(table)
    with Results(args.out, command_line()) as results:
        results.note(runs=records)


def measure_gpu(args: argparse.Namespace) -> None:
    """One GPU: graphs, steps, verification and drafting."""
    import torch

    from paceline.benchmarks.common.results import Results
    from paceline.benchmarks.decoding.gpu import device, measure
    from paceline.rl.errors import UserError

    if not torch.cuda.is_available():
        raise UserError("bench.py gpu: no CUDA device is visible; run it on a machine with one")
    with Results(args.out, command_line(), device=device()) as results:
        for shape in args.shapes:
            report = measure(shape, lambda line: print(line, flush=True))
            results.add("reports", report)
            for name, value in report.graph_memory.items():
                print(
                    f"{shape}: {name}: {value / 1e6:.0f} MB"
                    if value > 1000
                    else f"{shape}: {name}: {value:.3f}",
                    flush=True,
                )
            for batch, milliseconds, share in report.drafter:
                print(
                    f"{shape}: a draft step at batch {batch}: {milliseconds:.2f} ms, {share:.1%} of a decode "
                    "step",
                    flush=True,
                )


def print_plans(args: argparse.Namespace) -> None:
    """Planned bytes of graphs."""
    from paceline.benchmarks.decoding.gpu import SHAPES, planned

    for shape in SHAPES:
        count, bucketed, naive = planned(shape)
        print(
            f"{shape}: {count} graphs, {bucketed / 1e6:.0f} MB bucketed, {naive / 1e6:.0f} MB naive: "
            f"{bucketed / naive:.2f}"
        )


def compare_drafters(args: argparse.Namespace) -> None:
    """Drafters by temperature and batch, by sharing, or by position."""
    from paceline.benchmarks.common.harness import RolloutBench
    from paceline.benchmarks.common.results import Results
    from paceline.benchmarks.decoding.drafters import compare_drafters, compare_sharing, measure_positions
    from paceline.rl.process.process_tuning import fit_process
    from paceline.rl.recipe import load_config

    fit_process(local_world_size=1)
    config = load_config(args.config)
    with Results(args.out, command_line()) as results:
        keep = results.into("rows")
        if args.sharing:
            compare_sharing(RolloutBench(config, args.run, 1, 64), 3, 8, "suffix:4", keep)
        elif args.positions:
            measure_positions(
                RolloutBench(config, args.run, 1, 64), args.positions, args.positions // 8, (1024, None), keep
            )
        else:
            compare_drafters(config, args.run, args.temperatures, args.batches, print, keep)


def compare_verifiers(args: argparse.Namespace) -> None:
    """Verifiers in the engine, their theory and their bounds."""
    from dataclasses import replace

    from paceline.benchmarks.common.harness import RolloutBench
    from paceline.benchmarks.common.results import Results
    from paceline.benchmarks.decoding.verifiers import measure_verifiers
    from paceline.rl.process.process_tuning import fit_process
    from paceline.rl.recipe import load_config

    fit_process(local_world_size=1)
    config = load_config(args.config)
    with Results(args.out, command_line()) as results:
        for temperature in args.temperatures:
            bench = RolloutBench(
                replace(config, rollout=replace(config.rollout, temperature=temperature)), args.run, 1, 64
            )
            keep = results.into(f"verifiers, T = {temperature}")
            _, bounds = measure_verifiers(bench, args.batches[-1], 96, (1, 2, 3, 4), print, keep)
            results.put(f"bounds, T = {temperature}", bounds)


def compare_selection(args: argparse.Namespace) -> None:
    """The bandit against exhaustive search, and on whole batches."""
    from dataclasses import replace

    from paceline.benchmarks.common.harness import RolloutBench
    from paceline.benchmarks.common.results import Results
    from paceline.benchmarks.decoding.selection import compare_selection, measure_whole_batch
    from paceline.rl.process.process_tuning import fit_process
    from paceline.rl.recipe import load_config

    fit_process(local_world_size=1)
    config = load_config(args.config)
    with Results(args.out, command_line()) as results:
        for temperature in args.temperatures:
            warm = replace(config, rollout=replace(config.rollout, temperature=temperature))
            bench = RolloutBench(warm, args.run, 1, args.tail_cap)
            compare_selection(bench, args.batches, print, results.into(f"selection, T = {temperature}"))
            if args.whole_batch:
                whole = measure_whole_batch(bench, bench.workloads(("tail",))[0])
                print(f"{whole.workload}: {whole.ratio:.2f} x plain of at most {whole.bound:.2f}")
                results.add(f"whole batch, T = {temperature}", whole)


def compare_served(args: argparse.Namespace) -> None:
    """The exported drafter in vLLM."""
    from paceline.benchmarks.common.harness import RolloutBench
    from paceline.benchmarks.common.results import Results
    from paceline.benchmarks.decoding.served import compare_served
    from paceline.rl.process.process_tuning import fit_process
    from paceline.rl.recipe import load_config

    fit_process(local_world_size=1)
    with Results(args.out, command_line()) as results:
        row = compare_served(
            RolloutBench(load_config(args.config), args.run, 1, 64), args.peers, args.prompts, args.depth
        )
        results.add("rows", row)
    print(
        f"acceptance length over {row.prompts} prompts, greedy, chains of {row.depth}: engine "
        f"{row.engine:.3f}, vLLM {row.vllm:.3f}"
    )
    print(f"vLLM / engine {row.ratio:.3f}")


def compare_losses(args: argparse.Namespace) -> None:
    """Distillation losses by second of training."""
    from paceline.benchmarks.common.harness import RolloutBench
    from paceline.benchmarks.common.results import Results
    from paceline.benchmarks.training.losses import collection_cost, compare_losses
    from paceline.rl.process.process_tuning import fit_process
    from paceline.rl.recipe import load_config

    fit_process(local_world_size=1)
    bench = RolloutBench(load_config(args.config), args.run, 1, 64)
    with Results(args.out, command_line()) as results:
        cost = collection_cost(bench, passes=3)
        results.add("collection", cost)
        print(f"collecting traces: {cost.share:.1%} of rollout time")
        compare_losses(bench, args.seconds, args.sequences, print, results.into("rows"))


def compare_idle(args: argparse.Namespace) -> None:
    """Training on idle ranks against a frozen drafter."""
    from paceline.benchmarks.common.results import Results
    from paceline.benchmarks.training.idle import compare_idle

    with Results(args.out, command_line()) as results:
        keep = results.into("rows")
        frozen, trained = compare_idle(
            args.config, args.overrides, args.start, args.runs, args.ranks, print, keep
        )
    print(
        f"step with training / without: {trained.step / frozen.step:.3f}; rollouts "
        f"{trained.rollout / frozen.rollout:.3f}"
    )
    print(
        f"paired by step: {trained.longer:+.1%} ± {trained.longer_error:.1%}; the update, which training "
        "cannot touch: ",
        end="",
    )
    print(f"{trained.update_longer:+.1%}; a snapshot takes {1e3 * trained.snapshot:.0f} ms of a step")


def compare_learning(args: argparse.Namespace) -> None:
    """Finished runs with speculation beside such without."""
    from paceline.benchmarks.common.results import Results
    from paceline.benchmarks.training.learning import compare_learning, learning_row

    speculating, plain = ([learning_row(run) for run in runs] for runs in (args.speculating, args.plain))
    found = compare_learning(speculating, plain)
    for row in (*speculating, *plain):
        print(
            f"{row.run}: reward {row.reward:.3f}, length {row.length:.1f}, rollouts {row.rollout:.0f} s, "
            f"steps {row.step:.0f} s"
        )
    print(f"with speculation: reward {found.reward_difference:+.3f} ± {found.reward_error:.3f}", end=", ")
    print(f"length {found.length_difference:+.1f} ± {found.length_error:.1f}")
    print(
        f"rollouts {found.rollout_ratio:.2f}x, steps {found.step_ratio:.2f}x of {found.bound:.2f}x (Amdahl, "
        "at this rollout ratio)"
    )
    print(f"{found.limit:.2f}x would be the steps' ratio if rollouts took no time")
    with Results(args.out, command_line()) as results:
        results.put("runs", [*speculating, *plain])
        results.add("comparison", found)


def compare_sharding(args: argparse.Namespace) -> None:
    """A recipe in every way that weights can lie."""
    from paceline.benchmarks.common.results import Results
    from paceline.benchmarks.training.sharding import compare_sharding

    with Results(args.out, command_line()) as results:
        compare_sharding(args.config, args.overrides, args.runs, args.ranks, print, results.into("rows"))


def compare_online(args: argparse.Namespace) -> None:
    """Online learners beside each other on one moving policy."""
    from paceline.benchmarks.common.results import Results
    from paceline.benchmarks.training.online import compare_online
    from paceline.rl.process.process_tuning import fit_process
    from paceline.rl.recipe import load_config

    fit_process(local_world_size=1)
    config = load_config(args.config, args.overrides)
    with Results(args.out, command_line()) as results:
        rows = compare_online(
            config, args.start, args.seconds, args.runs, print, lambda rows: results.put("rows", rows)
        )
        results.put("rows", rows)
    for row in rows:
        mean = sum(row.lengths) / len(row.lengths)
        print(
            f"{row.variant:<50} {row.updates:>4} updates  mean length {mean:.3f}  regret "
            f"{row.regret[-1]:+.2f}"
        )


def draw_plots(args: argparse.Namespace) -> None:
    """Pictures beside the JSON files."""
    from paceline.benchmarks.common.plots import draw_all

    for path in draw_all(Path("benchmarks/results")):
        print(path)


def compare_speculation_end_to_end(args: argparse.Namespace) -> None:
    """The recipe plainly and adaptively."""
    from paceline.benchmarks.common.results import Results
    from paceline.benchmarks.training.end_to_end import compare_speculation

    with Results(args.out, command_line()) as results:
        plain, adaptive = compare_speculation(
            args.config, args.overrides, args.runs, print, results.into("runs")
        )
        ratios = {"rollout": plain.rollout / adaptive.rollout, "step": plain.step / adaptive.step}
        bound = plain.step / (plain.step - plain.rollout)
        results.note(ratios=ratios, bound=bound)
    for times in (plain, adaptive):
        print(times)
    print(
        f"rollout {ratios['rollout']:.2f}x, whole step {ratios['step']:.2f}x of at most {bound:.2f}x (Amdahl)"
    )


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
