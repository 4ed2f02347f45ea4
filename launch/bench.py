"""Benchmarks: ``python launch/bench.py rollout --config configs/quickstart.yaml --run runs/quickstart``.

- ``rollout``: decoding at 1 to 64 concurrent sequences and on a long-tailed GRPO batch, beside transformers' generate and
  (after ``make peers``) vLLM, and a decode step item by item; tables, ``OUT.json`` and ``OUT.png``.
- ``update``: the update's forward and backward against padding.
- ``seeds RUN…``: finished runs of one recipe side by side.
"""

import argparse
import json
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rl.bench import RolloutBench
from rl.bench_peers import Peers
from rl.bench_report import profile_table, results_table, write
from rl.bench_step import logprob_gap, profile_step, refresh_seconds
from rl.bench_update import measure_update
from rl.cli import user_errors
from rl.config import load_config
from rl.machine import fit_process
from rl.summary import read_metrics, summarise


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    rollout = commands.add_parser("rollout", help="decoding speed against transformers' generate")
    rollout.add_argument("--config", required=True)
    rollout.add_argument("--run", type=Path, help="a finished run: use its policy and drafter")
    rollout.add_argument("--repeats", type=int, default=2)
    rollout.add_argument("--tail-cap", type=int, default=1024, help="most tokens of a completion in the long-tailed batch")
    rollout.add_argument(
        "--peers", type=Path, default=Path(".venv-peers/bin/python"), help="interpreter that has vLLM (make peers)"
    )
    rollout.add_argument("--out", type=Path, default=Path("benchmarks/rollout"))
    update = commands.add_parser("update", help="speed of the update phase against padding")
    update.add_argument("--config", required=True)
    update.add_argument("--untuned", action="store_true", help="leave the allocator as glibc has it")
    seeds = commands.add_parser("seeds", help="reward rise of several runs")
    seeds.add_argument("runs", nargs="+", type=Path)
    seeds.add_argument("--out", type=Path, default=Path("benchmarks/seeds.json"))
    args = parser.parse_args()
    if args.command == "seeds":
        compare_runs(args.runs, args.out)
    elif args.command == "update":
        compare_updates(args)
    else:
        measure_rollout(args)


def measure_rollout(args: argparse.Namespace) -> None:
    """Decoding speed of one policy, its peers', and where a step's time goes."""
    fit_process(local_world_size=1)
    console = Console(width=160)
    bench = RolloutBench(load_config(args.config), args.run, args.repeats, args.tail_cap)
    profiles = [profile_step(bench.policy, batch) for batch in (1, 4, 16, 32)]
    console.print(profile_table(profiles))
    refresh, gap = refresh_seconds(bench.policy), logprob_gap(bench.policy, bench.workloads()[2].timed[:32])
    console.print(f"weight refresh {refresh:.3f} s; log-prob gap to the trainer's forward: mean {gap[0]:.4f}, largest {gap[1]:.3f}")
    peers = Peers(bench.policy, bench.path, args.peers if args.peers.exists() else None)
    results = bench.run(peers, lambda line: console.print(line, highlight=False))
    console.print(results_table(results))
    extra = {"refresh_seconds": refresh, "logprob_gap_mean": gap[0], "logprob_gap_max": gap[1]}
    write(results, profiles, extra, args.out, " ".join(["python", *sys.argv]))


def compare_updates(args: argparse.Namespace) -> None:
    """Tokens a second of the update, by method."""
    if not args.untuned:
        fit_process(local_world_size=1)
    results = measure_update(load_config(args.config))
    table = Table("method", "tokens/s", "÷ padded")
    for m in results:
        table.add_row(m.method, f"{m.tokens / m.seconds:.0f}", f"{results[0].seconds / m.seconds:.2f}")
    Console().print(table)


def compare_runs(runs: list[Path], out: Path) -> None:
    """Reward, rise and speed of finished runs, as a table and as JSON."""
    table = Table("run", "seed", "first quarter", "last quarter", "rise ÷ its standard error", "rollout ÷ plain", "peak GB")
    records = []
    for run in runs:
        s = {"seed": json.loads((run / "config.json").read_text())["seed"], **summarise(read_metrics(run))}
        records.append(s)
        ratio = (s["reward_after"] - s["reward_before"]) / s["reward_rise_std_error"]
        row = (s["reward_before"], s["reward_after"], ratio, s.get("rollout_speedup", float("nan")), s["peak_memory_gb"])
        table.add_row(run.name, str(s["seed"]), *(f"{x:.3f}" for x in row))
    Console().print(table)
    out.write_text(json.dumps({"command": " ".join(["python", *sys.argv]), "runs": records}, indent=2) + "\n")


if __name__ == "__main__":
    with user_errors():
        main()
