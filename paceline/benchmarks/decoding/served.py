"""The exported drafter in vLLM, beside the engine: is what was distilled what is served?"""

from __future__ import annotations

import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from paceline.benchmarks.common.harness import RolloutBench
from paceline.benchmarks.common.peers import Peers
from paceline.drafter_trainer.storage.checkpoint import save_drafter
from paceline.rl.errors import UserError
from paceline.rollout import Strategy, mean_acceptance_length
from paceline.rollout.drafters import DraftRules

_SLOTS = 16


@dataclass(frozen=True, slots=True)
class ServedRow:
    """Greedy decoding of the same prompts to the same lengths, chains of ``depth``.

    Attributes:
        prompts, depth: How many; draft tokens of a step.
        engine, vllm: Acceptance length: committed tokens of a sequence and verification.
    """

    prompts: int
    depth: int
    engine: float
    vllm: float

    @property
    def ratio(self) -> float:
        """vLLM's over the engine's."""
        return self.vllm / self.engine


def compare_served(bench: RolloutBench, python: Path, prompts: int, depth: int) -> ServedRow:
    """Exports the run's drafter, loads it into vLLM, and decodes ``prompts`` problems greedily with both.

    Args:
        bench: Of a run with a drafter.
        python: Interpreter of an environment with vLLM (``make peers``).
        prompts: How many problems.
        depth: Draft tokens of a step.

    Raises:
        UserError: without a drafter, or when vLLM fails.
    """
    if bench.drafter is None:
        raise UserError("served: the run has no drafter; name one that was made with the eagle3 drafter")
    greedy = replace(bench.params, temperature=0.0)
    requests = bench.with_natural_lengths(bench.requests(bench.problems[:prompts], prompts, 1, greedy))
    engine = bench.engine(_SLOTS, max(r.params.max_tokens for r in requests), DraftRules(), ("eagle3",))
    engine.use_strategy(Strategy("eagle3", depth))
    mine = mean_acceptance_length(engine.generate(requests))
    with tempfile.TemporaryDirectory() as folder:
        exported = Path(folder) / "drafter"
        save_drafter(bench.drafter, exported, torch.bfloat16)
        speculative = {"method": "eagle3", "model": str(exported), "num_speculative_tokens": depth}
        record = Peers(bench.policy, bench.path, python).run_vllm(
            _SLOTS, requests, requests[:1], 1, speculative
        )
    return ServedRow(prompts, depth, mine, 1 + record["accepted"] / record["drafts"])
