"""Compares group drafts inside vLLM with vLLM's own n-grams and suffix decoding (after ``make peers``).

All settings decode three batches of 8 prompts × 8 samples in vLLM with a run's policy: first the recipe's
problems as a warm-up, in which the adaptive scheduler begins to learn, then two epochs of a long-tailed GRPO
batch, with different seeds. Each setting has a process of its own in each round; the rounds take the settings
in turn.

vLLM's ``suffix`` needs arctic-inference, which is compiled when it is installed: ``.venv-peers/bin/pip
install --no-deps --target DIR arctic-inference==0.1.1``. It is left out without ``--arctic DIR``.
"""

from __future__ import annotations

import argparse
import gc
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from paceline.benchmarks.common.harness import RolloutBench
from paceline.benchmarks.common.peers import PEERS_PYTHON, VLLM_METHODS, Peers
from paceline.benchmarks.common.results import Results, machine
from paceline.rl.process.console import console
from paceline.rl.process.invocation import command_line
from paceline.rl.process.process_tuning import fit_process
from paceline.rl.recipe import load_config
from paceline.rollout import Request
from paceline.rollout.backends.adaptive.draft_schedule import draft_depths, listing_schedule
from paceline.rollout.backends.adaptive.vllm_options import ADAPTIVE_SCHEDULER

BATCHES = ("warm-up", "epoch 1", "epoch 2")
SETTINGS = ("plain", "ngram", "ngram adaptive", "suffix", "group adaptive")
_SECOND_EPOCH = 7_000_000  # added to the seeds of the requests
_GROUP = {
    "method": "custom_class",
    "model": "paceline.rollout.backends.vllm_suffix.GroupSuffixProposer",
    "num_speculative_tokens": 7,
}


@dataclass(frozen=True, slots=True)
class SuffixRow:
    """Holds one pass of one setting.

    Attributes:
        round: Number of the round, from 1.
        batch: One of `BATCHES`.
        setting: Name of the setting.
        tokens: Number of completion tokens.
        seconds: Wall time.
        drafts: Number of drafts that were verified.
        accepted: Number of draft tokens that were accepted.
    """

    round: int
    batch: str
    setting: str
    tokens: int
    seconds: float
    drafts: int
    accepted: int


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--config", required=True, help="recipe of the run")
    parser.add_argument("--run", type=Path, required=True, help="finished run whose policy decodes")
    parser.add_argument(
        "--peers", type=Path, default=PEERS_PYTHON, help="Python interpreter that has vLLM (make peers)"
    )
    parser.add_argument("--arctic", type=Path, help="folder with arctic-inference, for vLLM's suffix method")
    parser.add_argument(
        "--settings", nargs="+", choices=SETTINGS, default=SETTINGS, help="settings to measure"
    )
    parser.add_argument("--rounds", type=int, default=2, help="passes of all settings; the fastest counts")
    parser.add_argument("--tail-cap", type=int, default=1024, help="most tokens of a completion")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/vllm_suffix"), help="JSON file of the results"
    )


def run(args: argparse.Namespace) -> None:
    """Measures every setting and writes the results.

    Raises:
        UserError: vLLM failed.
    """
    fit_process(local_world_size=1)
    bench = RolloutBench(load_config(args.config), args.run, repeats=1, tail_cap=args.tail_cap)
    rows: list[SuffixRow] = []
    with Results(args.out, command_line(), machine=machine()) as results:
        for row in measure(bench, args.peers, args.arctic, args.settings, args.rounds):
            rows.append(row)
            results.add("rows", row)
            speed = row.tokens / row.seconds
            console().print(f"{row.round} {row.setting:<15} {row.batch:<13} {speed:7.1f} tokens/s")
    console().print(suffix_table(rows))


def measure(
    bench: RolloutBench, python: Path, arctic: Path | None, only: Sequence[str], rounds: int
) -> Iterator[SuffixRow]:
    """Yields the passes of all settings.

    Args:
        bench: Policy of a finished run.
        python: Interpreter of an environment with vLLM.
        arctic: Folder with arctic-inference; None leaves vLLM's suffix method out.
        only: Settings to measure.
        rounds: Number of rounds; every second one takes the settings in reverse order.
    """
    batches = _batches(bench)
    # one short request more before each, so that no pass pays for what is made on first use
    first = [replace(batches[0][0], params=replace(batches[0][0].params, max_tokens=1))]
    workloads = [(len(batch), batch, first) for batch in batches]
    peers = Peers(bench.policy, bench.path, python)
    settings = [(name, setting) for name, setting in _settings(arctic).items() if name in only]
    for number in range(1, rounds + 1):
        for name, (speculative, options, variables) in settings:
            records = peers.run_vllm(workloads, 1, speculative, environment=variables, **options)
            for batch, record in zip(BATCHES, records, strict=True):
                yield SuffixRow(
                    number,
                    batch,
                    name,
                    record["tokens"],
                    record["seconds"],
                    int(record.get("drafts", 0)),
                    int(record.get("accepted", 0)),
                )
        settings.reverse()


def _batches(bench: RolloutBench) -> list[list[Request]]:
    """Returns the requests of the three batches, each with the length at which its sample ends by itself."""
    (tail,) = bench.workloads(["tail"])
    params = replace(bench.params, max_tokens=bench.tail_cap)
    again = [replace(r, params=params, seed=r.seed + _SECOND_EPOCH) for r in tail.timed]
    batches = [tail.warm, tail.timed, bench.with_natural_lengths(again)]
    gc.collect()  # the engines' caches would stay beside vLLM's
    return batches


def _settings(
    arctic: Path | None,
) -> dict[str, tuple[dict[str, Any] | None, dict[str, Any], dict[str, str]]]:
    """Returns the speculative config, further arguments and environment variables of each setting."""
    ngram = VLLM_METHODS["vLLM n-gram"]
    assert ngram is not None
    settings: dict[str, tuple[dict[str, Any] | None, dict[str, Any], dict[str, str]]] = {
        "plain": (None, {}, {}),
        "ngram": (ngram, {}, {}),
        "ngram adaptive": (_listed(ngram), {"scheduler_cls": ADAPTIVE_SCHEDULER}, {}),
        "group adaptive": (_listed(_GROUP), {"scheduler_cls": ADAPTIVE_SCHEDULER}, {}),
    }
    if arctic is not None:
        path = os.pathsep.join([str(arctic.resolve()), *filter(None, [os.environ.get("PYTHONPATH")])])
        # its own plug-in, which patches vLLM, stays out
        settings["suffix"] = ({"method": "suffix"}, {}, {"PYTHONPATH": path, "VLLM_PLUGINS": "paceline"})
    return settings


def _listed(speculative: dict[str, Any]) -> dict[str, Any]:
    """Returns the config with a schedule that lets the adaptive scheduler choose any depth."""
    depths = draft_depths(speculative["method"], speculative["num_speculative_tokens"])
    return {**speculative, "num_speculative_tokens_per_batch_size": listing_schedule(depths)}


def suffix_table(rows: Sequence[SuffixRow]) -> Table:
    """Returns tokens per second of the fastest round by setting and batch, and their ratios."""
    table = Table("batch", "setting", "tokens/s", "÷ plain", "÷ ngram", "acceptance length", "accepted share")
    for batch in dict.fromkeys(row.batch for row in rows):
        speeds: dict[str, float] = {}
        for setting in dict.fromkeys(row.setting for row in rows):
            best = min(
                (row for row in rows if (row.batch, row.setting) == (batch, setting)),
                key=lambda row: row.seconds,
            )
            speeds[setting] = speed = best.tokens / best.seconds
            table.add_row(
                batch,
                setting,
                f"{speed:.1f}",
                *(f"{speed / speeds[base]:.2f}" if base in speeds else "" for base in ("plain", "ngram")),
                f"{1 + best.accepted / best.drafts:.2f}" if best.drafts else "",
                f"{best.accepted / best.tokens:.2f}",
            )
    return table
