"""Compares the adaptive scheduler in vLLM with every static number of draft tokens (after ``make peers``).

All settings decode the same requests with a run's policy and drafter, in vLLM, at 1 to 64 sequences: plainly,
with each static depth, and with `paceline.rollout.backends.vllm_scheduler.AdaptiveScheduler`. Each setting
warms up on as many requests again, with other seeds, in which the adaptive scheduler learns.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from paceline.benchmarks.common.harness import RolloutBench, Workload
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

_WORKLOADS = ("1", "4", "16", "32", "64")
_OTHER_SEEDS = 7_000_000


@dataclass(frozen=True, slots=True)
class DepthRow:
    """Holds one setting's fastest pass on one workload.

    Attributes:
        workload: Number of sequences.
        setting: ``plain``, a static number of draft tokens, or ``adaptive``.
        tokens_per_second: Completion tokens per second of wall time.
        acceptance_length: Committed tokens of a step with a draft; None where nothing is drafted.
    """

    workload: str
    setting: str
    tokens_per_second: float
    acceptance_length: float | None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--config", required=True, help="recipe of the run")
    parser.add_argument("--run", type=Path, required=True, help="finished run with an EAGLE-3 drafter")
    parser.add_argument(
        "--peers", type=Path, default=PEERS_PYTHON, help="Python interpreter that has vLLM (make peers)"
    )
    parser.add_argument("--depths", nargs="+", type=int, default=[1, 2, 3, 5], help="static depths")
    parser.add_argument("--workloads", nargs="+", default=list(_WORKLOADS), help="numbers of sequences")
    parser.add_argument("--repeats", type=int, default=1, help="timed passes; the fastest counts")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/vllm_depths"), help="JSON file of the results"
    )


def run(args: argparse.Namespace) -> None:
    """Measures every setting and writes the results.

    Raises:
        UserError: The run has no drafter, or vLLM failed.
    """
    fit_process(local_world_size=1)
    bench = RolloutBench(load_config(args.config), args.run, args.repeats)
    if bench.drafter is None:
        raise UserError(
            "bench vllm-depths: the run has no EAGLE-3 drafter; name one whose speculation.drafters "
            "include eagle3"
        )
    rows: list[DepthRow] = []
    with Results(args.out, command_line(), machine=machine()) as results:
        for row in measure_depths(bench, args.peers, args.depths, args.workloads):
            rows.append(row)
            results.add("rows", row)
            console().print(f"{row.workload:>3} {row.setting:<9} {row.tokens_per_second:7.1f} tokens/s")
    console().print(depths_table(rows))


def measure_depths(
    bench: RolloutBench, python: Path, depths: Sequence[int], only: Sequence[str]
) -> Iterator[DepthRow]:
    """Yields the speed of every setting on every workload.

    Args:
        bench: Policy and drafter of a finished run.
        python: Interpreter of an environment with vLLM.
        depths: Static numbers of draft tokens; the adaptive scheduler chooses among them and 0.
        only: Numbers of sequences.
    """
    assert bench.drafter is not None
    workloads = [_with_learning(w) for w in bench.workloads(only)]
    peers = Peers(bench.policy, bench.path, python)
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "drafter"
        save_drafter(bench.drafter, exported, torch.bfloat16)
        drafting = {"method": "eagle3", "model": str(exported)}
        chosen = listing_schedule([0, *depths])
        settings: dict[str, tuple[dict[str, Any] | None, dict[str, Any]]] = {
            "plain": (None, {}),
            **{str(k): ({**drafting, "num_speculative_tokens": k}, {}) for k in depths},
            "adaptive": (
                {
                    **drafting,
                    "num_speculative_tokens": max(depths),
                    "num_speculative_tokens_per_batch_size": chosen,
                },
                {"scheduler_cls": ADAPTIVE_SCHEDULER},
            ),
        }
        for setting, (speculative, options) in settings.items():
            records = peers.run_vllm(workloads, bench.repeats, speculative, **options)
            for name, record in zip(only, records, strict=True):
                drafts = record.get("drafts", 0)
                length = 1 + record["accepted"] / drafts if drafts else None
                yield DepthRow(name, setting, record["tokens"] / record["seconds"], length)


def _with_learning(w: Workload) -> tuple[int, list[Request], list[Request]]:
    """Returns slots, timed requests, and warm-up requests: the timed ones with other seeds."""
    return w.slots, w.timed, [replace(r, seed=r.seed + _OTHER_SEEDS) for r in w.timed]


def depths_table(rows: Sequence[DepthRow]) -> Table:
    """Returns tokens per second by workload and setting, and the adaptive scheduler's ratios."""
    settings = list(dict.fromkeys(row.setting for row in rows))
    table = Table("sequences", *settings, "adaptive ÷ best static", "adaptive ÷ plain")
    for workload in dict.fromkeys(row.workload for row in rows):
        speeds = {row.setting: row.tokens_per_second for row in rows if row.workload == workload}
        best = max(speed for setting, speed in speeds.items() if setting != "adaptive")
        adaptive = speeds.get("adaptive", float("nan"))
        table.add_row(
            workload,
            *(f"{speeds[s]:.1f}" for s in settings),
            f"{adaptive / best:.2f}",
            f"{adaptive / speeds['plain']:.2f}",
        )
    return table
