"""What `launch/bench.py` does for its commands about lengths."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from paceline.rl.process.invocation import command_line


def compare_rewards(args: argparse.Namespace) -> None:
    """Length-aware rewards beside plain GRPO."""
    from rich.table import Table

    from paceline.benchmarks.common.results import Results
    from paceline.benchmarks.lengths.rewards import compare_rewards
    from paceline.rl.process.console import console

    with Results(args.out, command_line()) as results:
        rows = compare_rewards(args.recipes, args.base, args.seeds, args.runs, print, results.into("rows"))
    table = Table(
        "recipe", "accuracy", "less plain GRPO", "length", "÷ plain GRPO", "entropy", "seconds a step"
    )
    for r in rows:
        change = f"{r.accuracy_change:+.3f} ± {r.accuracy_error:.3f}"
        table.add_row(
            r.recipe,
            f"{r.accuracy:.3f}",
            change,
            f"{r.length:.1f}",
            f"{r.length_ratio:.2f}",
            f"{r.entropy:.3f}",
            f"{r.step:.1f}",
        )
    console().print(table)


def compare_prediction(args: argparse.Namespace) -> None:
    """Length predictors, and the engine with their word."""
    from paceline.benchmarks.common.harness import RolloutBench
    from paceline.benchmarks.common.results import Results
    from paceline.benchmarks.lengths.prediction import compare_orders, compare_predictors, observe
    from paceline.rl.process.process_tuning import fit_process
    from paceline.rl.recipe import load_config

    fit_process(local_world_size=1)
    bench = RolloutBench(load_config(args.config), args.run, 1)
    seen = observe(bench, args.prompts, args.samples)
    known, held_out = seen.split(args.prompts * 2 // 3)
    lengths = sorted(n for e in seen.examples for n in e.lengths)
    middle, high = lengths[len(lengths) // 2], lengths[len(lengths) * 99 // 100]
    print(f"{len(lengths)} completions: median {middle}, p99 {high}, {seen.loops} loops")
    with Results(args.out, command_line()) as results:
        rows = compare_predictors(known, held_out, bench.params.max_tokens)
        results.put("predictors", rows)
        for r in rows:
            print(
                f"{r.predictor:<42} median {r.at_median:.2f} ± {r.error_median:.2f}  0.9: {r.at_ninety:.2f} "
                f"± {r.error_ninety:.2f}"
            )
        compare_orders(bench, known, held_out, args.slots, None, print, results.into("orders"))
        print(f"with room for {args.cache_tokens} tokens:")
        compare_orders(
            bench, known, held_out, args.slots, args.cache_tokens, print, results.into("little_cache")
        )


def compare_remedies(args: argparse.Namespace) -> None:
    """Remedies of the tail on one workload."""
    from rich.table import Table

    from paceline.benchmarks.common.results import Results
    from paceline.benchmarks.lengths.tail import REMEDIES, compare_remedies
    from paceline.rl.process.console import console

    with Results(args.out, command_line()) as results:
        names, keep = args.only or list(REMEDIES), results.into("rows")
        rows = compare_remedies(args.config, args.overrides, names, args.runs, args.ranks, print, keep)
    base = rows[0]
    table = Table(
        "remedy",
        "rollout s",
        "step s",
        "÷ none, by completion",
        "length",
        "drawn",
        "reward",
        "entropy",
        "ratio spread",
    )
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
    console().print(table)


LENGTH_COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
    "lengths": compare_rewards,
    "prediction": compare_prediction,
    "tail": compare_remedies,
}
