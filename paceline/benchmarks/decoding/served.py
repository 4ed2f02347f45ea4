"""Compares a run's exported drafter in vLLM (after ``make peers``) with the same drafter in the engine."""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from paceline.benchmarks.common.harness import RolloutBench
from paceline.benchmarks.common.peers import PEERS_PYTHON, Peers
from paceline.benchmarks.common.results import Results
from paceline.drafter_trainer.storage.checkpoint import save_drafter
from paceline.rl.errors import UserError
from paceline.rl.process.invocation import command_line
from paceline.rl.process.process_tuning import fit_process
from paceline.rl.recipe import load_config
from paceline.rollout import Strategy, mean_acceptance_length
from paceline.rollout.drafters import DraftRules

_SLOTS = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark."""
    parser.add_argument("--config", required=True, help="recipe of the run")
    parser.add_argument("--run", type=Path, required=True, help="finished run")
    parser.add_argument(
        "--peers", type=Path, default=PEERS_PYTHON, help="Python interpreter that has vLLM (make peers)"
    )
    parser.add_argument("--prompts", type=int, default=64, help="number of problems to decode")
    parser.add_argument("--depth", type=int, default=4, help="draft tokens per step")
    parser.add_argument(
        "--out", type=Path, default=Path("benchmarks/results/served"), help="JSON file of the results"
    )


def run(args: argparse.Namespace) -> None:
    """Measures the drafter in the engine and in vLLM and prints both acceptance lengths."""
    fit_process(local_world_size=1)
    with Results(args.out, command_line()) as results:
        bench = RolloutBench(load_config(args.config), args.run, 1, 64)
        for row in compare_served(bench, args.peers, args.prompts, args.depth):
            results.add("rows", row)
            print(
                f"{row.drafter}, {row.prompts} prompts, greedy, chains of {row.depth}: acceptance length "
                f"{row.engine:.3f} in the engine, {row.vllm:.3f} in vLLM, ratio {row.ratio:.3f}"
            )


@dataclass(frozen=True, slots=True)
class ServedRow:
    """Holds the acceptance lengths of greedy decoding of the same prompts to the same lengths.

    Attributes:
        drafter: ``eagle3`` for a pass a token, ``parallel`` for drafts in one pass.
        prompts: Number of prompts.
        depth: Number of draft tokens per step, in chains.
        engine: Acceptance length in the engine: committed tokens per sequence and verification.
        vllm: Acceptance length in vLLM.
    """

    drafter: str
    prompts: int
    depth: int
    engine: float
    vllm: float

    @property
    def ratio(self) -> float:
        """The acceptance length in vLLM relative to the engine."""
        return self.vllm / self.engine


def compare_served(bench: RolloutBench, python: Path, prompts: int, depth: int) -> list[ServedRow]:
    """Exports the run's drafter, loads it into vLLM, and decodes problems greedily with both.

    A drafter that can draft in one pass does so, too, in a second comparison.

    Args:
        bench: Policy and drafter of a finished run.
        python: Interpreter of an environment with vLLM (``make peers``).
        prompts: Number of problems.
        depth: Number of draft tokens per step.

    Raises:
        UserError: The run has no drafter, or vLLM failed.
    """
    if bench.drafter is None:
        raise UserError(
            "bench served: the run has no EAGLE-3 drafter; name one whose speculation.drafters include eagle3"
        )
    greedy = replace(bench.params, temperature=0.0)
    requests = bench.with_natural_lengths(bench.requests(bench.problems[:prompts], prompts, 1, greedy))
    drafters = bench.eagle3_ways()
    engine = bench.engine(_SLOTS, max(r.params.max_tokens for r in requests), DraftRules(), drafters)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "drafter"
        save_drafter(bench.drafter, exported, torch.bfloat16)
        for name in drafters:
            engine.use_strategy(Strategy(name, depth))
            in_engine = mean_acceptance_length(engine.generate(requests))
            speculative = {"method": "eagle3", "model": str(exported), "num_speculative_tokens": depth}
            if name == "parallel":
                speculative["parallel_drafting"] = True
            (record,) = Peers(bench.policy, bench.path, python).run_vllm(
                [(_SLOTS, requests, requests[:1])], 1, speculative
            )
            served = 1 + record["accepted"] / record["drafts"]
            rows.append(ServedRow(name, prompts, depth, in_engine, served))
    return rows
