"""Benchmarks: ``paceline bench rollout --config configs/quickstart.yaml --run runs/quickstart``, or
launch/bench.py.

- ``rollout``: decoding at 1 to 64 concurrent sequences and on a long-tailed GRPO batch, beside transformers'
  generate and (after ``make peers``) vLLM, and a decode step item by item; tables, ``OUT.json`` and
  ``OUT.png``.
- ``update``: the update's forward and backward against padding.
- ``seeds RUN…``: finished runs of one recipe side by side.
- ``gpu``: graph memory naive and bucketed, step times with graphs and without, the price of verifying and of
  drafting, for a 1.5B and an 8B shape of random weights on one GPU; torch and transformers suffice.
- ``plan``: the memory that graphs of those shapes would take, naive and bucketed; needs no GPU.
- ``drafters``: every drafter at several temperatures and batches; what sharing within a group brings
  (``--sharing``); acceptance by position in long texts (``--positions 8000``).
- ``verifiers``: every verifier on the policy's own distributions, with its theory and the best that is
  possible.
- ``selection``: the bandit against every fixed strategy, and whole batches against Amdahl's bound.
- ``losses``: distillation losses for a fixed time of training each, and what collecting their data costs a
  rollout.
- ``idle``: a recipe with its drafter frozen, and trained on idle ranks: what a step costs, and how acceptance
  develops.
- ``online``: ways to learn online on one moving policy, and what each loses against the best fixed drafter in
  hindsight.
- ``learning``: runs with speculation beside such without, of the same seeds: rewards, lengths, rollouts' and
  steps' ratios.
- ``sharding``: a recipe trained whole on every rank, by ZeRO 0 to 3 and by FSDP2: loss curves, gathering,
  memory.
- ``served``: a run's drafter in vLLM (after ``make peers``), its acceptance beside the engine's.
- ``lengths``: length-aware rewards beside plain GRPO, seed by seed: accuracy and length.
- ``prediction``: length predictors on held-out prompts; the order of admission and the cache kept by their
  word.
- ``tail``: remedies of the tail on one workload, alone and with speculation.
- ``trl``: TRL's own generation and ours in TRL's trainer: learning, and what a step takes.
- ``plots``: draws the pictures of these anew from benchmarks/*.json.
- ``gpu-rl``: trains a 25 M reasoner from nothing on one GPU, then runs GRPO with completions of up to 4096
  tokens plainly and
  adaptively: the ratio end to end.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from paceline.benchmarks.commands import COMMANDS
from paceline.benchmarks.common.results import check_target
from paceline.rl.errors import user_errors
from paceline.rl.process.console import announce

NOT_REWARDS = {"verbose", "long_tail", "segments", "tree", "prod_d"}


def main(arguments: Sequence[str] | None = None, program: str | None = None) -> None:
    """Runs a benchmark.

    Args:
        arguments: Of the command line; None takes the process's own.
        program: What help calls it.
    """
    parser = argparse.ArgumentParser(
        prog=program, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    rollout = commands.add_parser("rollout", help="decoding speed against transformers' generate")
    rollout.add_argument("--config", required=True)
    rollout.add_argument("--run", type=Path, help="a finished run: use its policy and drafter")
    rollout.add_argument("--repeats", type=int, default=2)
    rollout.add_argument(
        "--tail-cap", type=int, default=1024, help="most tokens of a completion in the long-tailed batch"
    )
    rollout.add_argument(
        "--own-problems",
        action="store_true",
        help="what the recipe's rollouts ask, instead of others of the kind",
    )
    rollout.add_argument(
        "--workloads", nargs="+", help="1, 4, 16, 32, 64 sequences, tail; all where none is named"
    )
    rollout.add_argument(
        "--peers",
        type=Path,
        default=Path(".venv-peers/bin/python"),
        help="interpreter that has vLLM (make peers)",
    )
    rollout.add_argument("--alone", action="store_true", help="only this engine, no peers")
    rollout.add_argument("--out", type=Path, default=Path("benchmarks/rollout"))
    rollout.add_argument("overrides", nargs="*", help="key=value")
    update = commands.add_parser("update", help="speed of the update phase against padding")
    update.add_argument("--config", required=True)
    update.add_argument("--untuned", action="store_true", help="leave the allocator as glibc has it")
    seeds = commands.add_parser("seeds", help="reward rise of several runs")
    seeds.add_argument("runs", nargs="+", type=Path)
    seeds.add_argument("--out", type=Path, default=Path("benchmarks/seeds.json"))
    gpu = commands.add_parser("gpu", help="graphs, step times and drafting on one GPU")
    gpu.add_argument("--shapes", nargs="+", default=["1.5B", "8B"], choices=["1.5B", "8B"])
    gpu.add_argument("--out", type=Path, default=Path("benchmarks/gpu"))
    commands.add_parser("plan", help="memory of graphs, planned")
    gpu_rl = commands.add_parser("gpu-rl", help="GRPO from scratch on one GPU, with speculation and without")
    gpu_rl.add_argument("--config", type=Path, default=Path("configs/gpu_rl.yaml"))
    gpu_rl.add_argument("--runs", type=Path, default=Path("runs/gpu-rl"), help="where the two runs go")
    gpu_rl.add_argument("--out", type=Path, default=Path("benchmarks/gpu_rl.json"))
    gpu_rl.add_argument("overrides", nargs="*", help="key=value")
    for name, what in (
        ("drafters", "drafters side by side"),
        ("verifiers", "verifiers"),
        ("selection", "the bandit"),
    ):
        command = commands.add_parser(name, help=what)
        command.add_argument("--config", required=True)
        command.add_argument(
            "--run", type=Path, required=True, help="a finished run: its policy and drafter are used"
        )
        command.add_argument(
            "--batches", nargs="*", default=["1", "4", "16"], help="concurrent sequences, or none"
        )
        command.add_argument("--temperatures", nargs="+", type=float, default=[1.0, 0.7])
        command.add_argument("--out", type=Path, default=Path("benchmarks") / name)
        if name == "drafters":
            command.add_argument(
                "--sharing", action="store_true", help="measure sharing within groups instead"
            )
            command.add_argument(
                "--positions", type=int, help="measure acceptance by position up to here instead"
            )
        if name == "selection":
            command.add_argument(
                "--whole-batch",
                action="store_true",
                help="also plain and adaptive on the long-tailed GRPO batch",
            )
            command.add_argument(
                "--tail-cap",
                type=int,
                default=1024,
                help="most tokens of a completion in the long-tailed batch",
            )
    learning = commands.add_parser("learning", help="with speculation and without: the same learning")
    learning.add_argument(
        "--speculating", type=Path, nargs="+", required=True, help="finished runs, one a seed"
    )
    learning.add_argument(
        "--plain", type=Path, nargs="+", required=True, help="those of the same seeds without speculation"
    )
    learning.add_argument("--out", type=Path, default=Path("benchmarks/learning"))
    sharding = commands.add_parser("sharding", help="the ways that weights can lie")
    sharding.add_argument("--config", type=Path, required=True)
    sharding.add_argument("--runs", type=Path, required=True, help="where the runs go")
    sharding.add_argument("--ranks", type=int, default=2)
    sharding.add_argument("--out", type=Path, default=Path("benchmarks/sharding"))
    sharding.add_argument("overrides", nargs="*", help="key=value")
    served = commands.add_parser("served", help="a run's drafter in vLLM, beside the engine")
    served.add_argument("--config", required=True)
    served.add_argument("--run", type=Path, required=True, help="a finished run")
    served.add_argument(
        "--peers",
        type=Path,
        default=Path(".venv-peers/bin/python"),
        help="interpreter of an environment with vLLM",
    )
    served.add_argument("--prompts", type=int, default=64)
    served.add_argument("--depth", type=int, default=4, help="draft tokens of a step")
    served.add_argument("--out", type=Path, default=Path("benchmarks/served"))
    losses = commands.add_parser("losses", help="distillation losses, and what collecting their data costs")
    losses.add_argument("--config", required=True)
    losses.add_argument("--run", type=Path, required=True, help="a finished run")
    losses.add_argument("--seconds", type=float, default=45.0, help="of training each loss")
    losses.add_argument("--sequences", type=int, default=192)
    losses.add_argument("--out", type=Path, default=Path("benchmarks/losses"))
    idle = commands.add_parser("idle", help="the drafter trained on idle ranks, beside a frozen one")
    idle.add_argument("--config", type=Path, required=True)
    idle.add_argument(
        "--start", type=Path, required=True, help="the drafter to start from, of launch/warmup_drafter.py"
    )
    idle.add_argument("--ranks", type=int, default=2)
    idle.add_argument("--runs", type=Path, default=Path("runs/idle"), help="where the runs go")
    idle.add_argument("--out", type=Path, default=Path("benchmarks/idle"))
    idle.add_argument("overrides", nargs="*", help="key=value")
    online = commands.add_parser("online", help="online learners beside each other, and their regret")
    online.add_argument("--config", required=True)
    online.add_argument(
        "--start", type=Path, required=True, help="the drafter to start from, of launch/warmup_drafter.py"
    )
    online.add_argument(
        "--seconds", type=float, default=2.0, help="of training each has after a step's rollouts"
    )
    online.add_argument("--runs", type=Path, default=Path("runs/online"), help="where the run goes")
    online.add_argument("--out", type=Path, default=Path("benchmarks/online"))
    online.add_argument("overrides", nargs="*", help="key=value")
    add_length_commands(commands)
    trl = commands.add_parser("trl", help="rollouts in TRL's trainer, beside its own generation")
    trl.add_argument("--config", default="configs/length/verbose.yaml")
    trl.add_argument("--drafter", type=Path, default=Path("runs/quickstart-drafter"), help="to start from")
    trl.add_argument("--ranks", type=int, default=2)
    trl.add_argument("--runs", type=Path, default=Path("runs/trl"), help="where the runs are or go")
    trl.add_argument("--out", type=Path, default=Path("benchmarks/trl"))
    trl.add_argument("overrides", nargs="*", help="key=value")
    commands.add_parser("plots", help="pictures of drafters, verifiers and selection")
    args = parser.parse_args(arguments)
    with user_errors():
        if "out" in args:
            check_target(args.out)
        announce(f"bench {args.command}: loading torch and transformers")
        COMMANDS[args.command](args)


def add_length_commands(commands: Any) -> None:
    rewards = sorted(path for path in Path("configs/length").glob("*.yaml") if path.stem not in NOT_REWARDS)
    lengths = commands.add_parser("lengths", help="length-aware rewards beside plain GRPO")
    lengths.add_argument(
        "--base", type=Path, default=Path("configs/length/verbose.yaml"), help="the recipe of plain GRPO"
    )
    lengths.add_argument("--recipes", type=Path, nargs="+", default=rewards)
    lengths.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    lengths.add_argument("--runs", type=Path, default=Path("runs/lengths"), help="where the runs are or go")
    lengths.add_argument("--out", type=Path, default=Path("benchmarks/lengths"))
    prediction = commands.add_parser("prediction", help="length predictors, and the engine with their word")
    prediction.add_argument("--config", default="configs/length/long_tail.yaml")
    prediction.add_argument("--run", type=Path, help="a finished run: its policy is used")
    prediction.add_argument("--prompts", type=int, default=144, help="a third of them held out")
    prediction.add_argument("--samples", type=int, default=8)
    prediction.add_argument("--slots", type=int, default=16)
    prediction.add_argument(
        "--cache-tokens", type=int, default=2048, help="of the cache, where there is little"
    )
    prediction.add_argument("--out", type=Path, default=Path("benchmarks/prediction"))
    tail = commands.add_parser("tail", help="remedies of the tail")
    tail.add_argument("--config", type=Path, default=Path("configs/length/long_tail.yaml"))
    tail.add_argument(
        "--only", nargs="+", help="remedies by name; the first is what the others are compared with"
    )
    tail.add_argument("--ranks", type=int, default=2)
    tail.add_argument("--runs", type=Path, default=Path("runs/tail"), help="where the runs are or go")
    tail.add_argument("--out", type=Path, default=Path("benchmarks/tail"))
    tail.add_argument("overrides", nargs="*", help="key=value")
