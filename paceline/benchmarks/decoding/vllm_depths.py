"""Compares the adaptive scheduler in vLLM with every static number of draft tokens (after ``make peers``).

All settings decode the same requests with a run's policy and drafter, in vLLM, at 1 to 64 sequences and as a
long-tailed GRPO batch: plainly, with each static depth, and with
`paceline.rollout.backends.vllm_scheduler.AdaptiveScheduler`. Each setting has a process of its own and warms
up on as many requests again, with other seeds, in which the adaptive scheduler learns. Then they decode in
turn, round after round and each time in another order, so that other work on the machine hits all of them.
Medians count.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from rich.table import Table

from paceline.benchmarks.common.harness import RolloutBench, Workload
from paceline.benchmarks.common.peer_process import Turns
from paceline.benchmarks.common.peers import PEERS_PYTHON, Peers
from paceline.benchmarks.common.results import Results, machine
from paceline.drafter_trainer.storage.checkpoint import save_drafter
from paceline.rl.errors import UserError
from paceline.rl.process.console import console
from paceline.rl.process.invocation import command_line
from paceline.rl.process.process_tuning import fit_process
from paceline.rl.recipe import load_config
from paceline.rollout import Request
from paceline.rollout.backends.adaptive.draft_schedule import listing_schedule
from paceline.rollout.backends.adaptive.vllm_options import ADAPTIVE_SCHEDULER

_WORKLOADS = ("1", "4", "16", "32", "64", "tail")
_OTHER_SEEDS = 7_000_000


@dataclass(frozen=True, slots=True)
class DepthRow:
    """Holds one setting's passes on one workload.

    Attributes:
        workload: Number of sequences, or ``tail``.
        setting: ``plain``, a static number of draft tokens, or ``adaptive``.
        rounds: Completion tokens per second of wall time, of each round.
        acceptance_length: Committed tokens of a step with a draft; None where nothing is drafted.
        depths: Number of steps by the depth that they verified, where it is chosen.
    """

    workload: str
    setting: str
    rounds: list[float]
    acceptance_length: float | None
    depths: dict[str, int] = field(default_factory=dict)

    @property
    def speed(self) -> float:
        """The median of the rounds."""
        return median(self.rounds)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--config", required=True, help="recipe of the run")
    parser.add_argument("--run", type=Path, required=True, help="finished run with an EAGLE-3 drafter")
    parser.add_argument(
        "--peers", type=Path, default=PEERS_PYTHON, help="Python interpreter that has vLLM (make peers)"
    )
    parser.add_argument("--depths", nargs="+", type=int, default=[1, 2, 3, 5], help="static depths")
    parser.add_argument(
        "--workloads",
        nargs="+",
        default=list(_WORKLOADS),
        help="numbers of sequences, and tail: the long-tailed GRPO batch",
    )
    parser.add_argument("--rounds", type=int, default=3, help="timed passes of each setting")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/vllm_depths"), help="JSON file of the results"
    )


def run(args: argparse.Namespace) -> None:
    """Measures every setting and writes the results.

    Raises:
        UserError: The run has no drafter, or vLLM failed.
    """
    fit_process(local_world_size=1)
    bench = RolloutBench(load_config(args.config), args.run, 1)
    if bench.drafter is None:
        raise UserError(
            "bench vllm-depths: the run has no EAGLE-3 drafter; name one whose speculation.drafters "
            "include eagle3"
        )
    rows: list[DepthRow] = []
    with Results(args.out, command_line(), machine=machine()) as results:
        for row in measure_depths(bench, args.peers, args.depths, args.workloads, args.rounds):
            rows.append(row)
            results.add("rows", row)
            console().print(f"{row.workload:>4} {row.setting:<9} {row.speed:7.1f} tokens/s")
    console().print(depths_table(rows))


def measure_depths(
    bench: RolloutBench, python: Path, depths: Sequence[int], only: Sequence[str], rounds: int
) -> Iterator[DepthRow]:
    """Yields the speeds of every setting on every workload.

    Args:
        bench: Policy and drafter of a finished run.
        python: Interpreter of an environment with vLLM.
        depths: Static numbers of draft tokens; the adaptive scheduler chooses among them and 0.
        only: Names of workloads.
        rounds: Number of timed passes of each setting.
    """
    assert bench.drafter is not None
    names = sorted(only, key=_WORKLOADS.index)  # the order in which the bench makes them
    workloads = [_with_learning(w) for w in bench.workloads(names)]
    peers = Peers(bench.policy, bench.path, python)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        exported = Path(folder) / "drafter"
        save_drafter(bench.drafter, exported, torch.bfloat16)
        turns = {
            setting: stack.enter_context(peers.vllm_turns(workloads, speculative, **options))
            for setting, (speculative, options) in _settings(exported, depths).items()
        }
        for number, name in enumerate(names):
            yield from take_turns(name, number, turns, rounds)


def _settings(
    drafter: Path, depths: Sequence[int]
) -> dict[str, tuple[dict[str, Any] | None, dict[str, Any]]]:
    """Returns vLLM's speculative config and further options of each setting."""
    drafting = {"method": "eagle3", "model": str(drafter), "num_speculative_tokens": max(depths)}
    chosen = {**drafting, "num_speculative_tokens_per_batch_size": listing_schedule([0, *depths])}
    return {
        "plain": (None, {}),
        **{str(k): ({**drafting, "num_speculative_tokens": k}, {}) for k in depths},
        "adaptive": (chosen, {"scheduler_cls": ADAPTIVE_SCHEDULER}),
    }


def take_turns(name: str, number: int, turns: Mapping[str, Turns], rounds: int) -> Iterator[DepthRow]:
    """Yields the row of each setting on one workload, once all have decoded it in turn."""
    passes: dict[str, list[dict[str, Any]]] = {setting: [] for setting in turns}
    for decode in turns.values():
        decode((number, "warm"))
    order = list(turns)
    for _ in range(rounds):
        for setting in order:
            passes[setting].append(turns[setting]((number, "timed")))
        order = [*order[1:], order[0]]
    for setting, records in passes.items():
        drafts = sum(r.get("drafts", 0) for r in records)
        length = 1 + sum(r["accepted"] for r in records) / drafts if drafts else None
        speeds = [r["tokens"] / r["seconds"] for r in records]
        steps = sum((Counter(r.get("depths", {})) for r in records), Counter[str]())
        yield DepthRow(name, setting, speeds, length, dict(steps))


def _with_learning(w: Workload) -> tuple[int, list[Request], list[Request]]:
    """Returns slots, timed requests, and warm-up requests: the timed ones with other seeds."""
    return w.slots, w.timed, [replace(r, seed=r.seed + _OTHER_SEEDS) for r in w.timed]


def depths_table(rows: Sequence[DepthRow]) -> Table:
    """Returns tokens per second by workload and setting, and the adaptive scheduler's ratios."""
    settings = list(dict.fromkeys(row.setting for row in rows))
    table = Table("sequences", *settings, "adaptive ÷ best static", "adaptive ÷ plain")
    for workload in dict.fromkeys(row.workload for row in rows):
        speeds = {row.setting: row.speed for row in rows if row.workload == workload}
        best = max(speed for setting, speed in speeds.items() if setting != "adaptive")
        adaptive = speeds.get("adaptive", float("nan"))
        table.add_row(
            workload,
            *(f"{speeds[s]:.1f}" for s in settings),
            f"{adaptive / best:.2f}",
            f"{adaptive / speeds['plain']:.2f}",
        )
    return table
