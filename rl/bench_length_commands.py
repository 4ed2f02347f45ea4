"""What `launch/bench.py` does for its commands about lengths."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from rl.command_line import command_line


def compare_rewards(args: argparse.Namespace) -> None:
    """Length-aware rewards beside plain GRPO."""
    from rich.console import Console
    from rich.table import Table

    from rl.bench_lengths import compare_rewards
    from rl.bench_report import write_rows

    rows = compare_rewards(args.recipes, args.base, args.seeds, args.runs, print)
    table = Table("recipe", "accuracy", "less plain GRPO", "length", "÷ plain GRPO", "entropy", "seconds a step")
    for r in rows:
        change = f"{r.accuracy_change:+.3f} ± {r.accuracy_error:.3f}"
        table.add_row(
            r.recipe, f"{r.accuracy:.3f}", change, f"{r.length:.1f}", f"{r.length_ratio:.2f}", f"{r.entropy:.3f}", f"{r.step:.1f}"
        )
    Console(width=140).print(table)
    write_rows({"rows": rows}, args.out, command_line())


def compare_prediction(args: argparse.Namespace) -> None:
    """Length predictors, and the engine with their word."""
    from rl.bench import RolloutBench
    from rl.bench_prediction import compare_orders, compare_predictors, observe
    from rl.bench_report import write_rows
    from rl.config import load_config
    from rl.machine import fit_process

    fit_process(local_world_size=1)
    bench = RolloutBench(load_config(args.config), args.run, 1)
    seen = observe(bench, args.prompts, args.samples)
    known, held_out = seen.split(args.prompts * 2 // 3)
    lengths = sorted(n for e in seen.examples for n in e.lengths)
    middle, high = lengths[len(lengths) // 2], lengths[len(lengths) * 99 // 100]
    print(f"{len(lengths)} completions: median {middle}, p99 {high}, {seen.loops} loops")
    rows = compare_predictors(known, held_out, bench.params.max_tokens)
    for r in rows:
        print(f"{r.predictor:<42} median {r.at_median:.2f} ± {r.error_median:.2f}  0.9: {r.at_ninety:.2f} ± {r.error_ninety:.2f}")
    orders = compare_orders(bench, known, held_out, args.slots, None, print)
    print(f"with room for {args.cache_tokens} tokens:")
    tight = compare_orders(bench, known, held_out, args.slots, args.cache_tokens, print)
    write_rows({"predictors": rows, "orders": orders, "little_cache": tight}, args.out, command_line())


def compare_remedies(args: argparse.Namespace) -> None:
    """Remedies of the tail on one workload."""
    from rich.console import Console
    from rich.table import Table

    from rl.bench_report import write_rows
    from rl.bench_tail import REMEDIES, compare_remedies

    rows = compare_remedies(args.config, args.overrides, args.only or list(REMEDIES), args.runs, args.ranks, print)
    base = rows[0]
    table = Table("remedy", "rollout s", "step s", "÷ none, by completion", "length", "drawn", "reward", "entropy", "ratio spread")
    for r in rows:
        table.add_row(
            r.remedy,
            f"{r.rollout:.2f}",
            f"{r.step:.2f}",
            f"{base.step_by_completion / r.step_by_completion:.2f}",
            f"{r.length:.1f}",
            f"{r.drawn:.2f}",
            f"{r.reward_before:.3f} → {r.reward_after:.3f}",
            f"{r.entropy_before:.3f} → {r.entropy_after:.3f}",
            f"{r.ratio_spread:.4f}",
        )
    Console(width=160).print(table)
    write_rows({"rows": rows}, args.out, command_line())


LENGTH_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "lengths": compare_rewards,
    "prediction": compare_prediction,
    "tail": compare_remedies,
}
