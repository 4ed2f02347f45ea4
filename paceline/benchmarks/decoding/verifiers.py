"""Measures every verifier on the policy's own distributions, beside its theory and the best possible."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from paceline.benchmarks.common.harness import RolloutBench, at_temperature
from paceline.benchmarks.common.options import add_policy_options
from paceline.benchmarks.common.results import Log, Results, RowCallback, ignore_row
from paceline.rl.process.invocation import command_line
from paceline.rl.process.process_tuning import fit_process
from paceline.rl.recipe import load_config
from paceline.rollout import mean_acceptance_length
from paceline.rollout.drafters import DraftRules
from paceline.rollout.trees import DraftKind, DraftTree
from paceline.rollout.verify import VERIFIERS, Uniforms, Verification, Verifier
from paceline.rollout.verify.optimal import (
    chain_acceptance,
    deterministic_acceptance,
    optimal_acceptance,
    recursive_acceptance,
    spectr_acceptance,
)

_RECURSIVE_DRAWS = 512  # Monte Carlo draws for recursive rejection without replacement
_PAIRS = 96  # pairs of target and drafter distributions that the bounds are averaged over
_CANDIDATES = (1, 2, 3, 4)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the options of this benchmark; only the last of ``--batches`` is used."""
    add_policy_options(parser, Path("benchmarks/results/verifiers"))


def run(args: argparse.Namespace) -> None:
    """Measures the verifiers and their bounds at each temperature."""
    fit_process(local_world_size=1)
    config = load_config(args.config)
    with Results(args.out, command_line()) as results:
        for temperature in args.temperatures:
            bench = RolloutBench(at_temperature(config, temperature), args.run, 1, 64)
            on_row = results.into(f"verifiers, T = {temperature}")
            _, bounds = measure_verifiers(bench, args.batches[-1], _PAIRS, _CANDIDATES, print, on_row)
            results.put(f"bounds, T = {temperature}", bounds)


@dataclass(frozen=True, slots=True)
class BoundRow:
    """Holds the probability that one of k candidates is accepted, averaged over nodes that the policy met.

    Attributes:
        candidates: Number of candidates, k.
        deterministic: Acceptance of the drafter's k likeliest tokens, which are not drawn; it is its own
            bound, since no verifier accepts more of a fixed set.
        with_replacement: Acceptance of recursive rejection, candidates drawn with replacement.
        without_replacement: Acceptance of recursive rejection, candidates drawn without replacement.
        spectr: Acceptance of SpecTr's k-sequential selection.
        bound_with: Best acceptance of any verifier for candidates drawn with replacement.
        bound_without: Best acceptance of any verifier for candidates drawn without replacement.
    """

    candidates: int
    deterministic: float
    with_replacement: float
    without_replacement: float
    spectr: float
    bound_with: float
    bound_without: float


@dataclass(frozen=True, slots=True)
class VerifierRow:
    """Holds the acceptance of one verifier and tree in the engine.

    Attributes:
        strategy: Drafter and shape of the draft.
        draw: How the draft tokens were drawn.
        verifier: Name of the verifier.
        nodes: Number of draft tokens per verification.
        acceptance_length: Committed tokens per sequence and target forward.
        acceptance: Share of drafts whose first level was accepted.
        theory: Expected acceptance on the same nodes, Σ min(p, q); None except for the chain verifier.
    """

    strategy: str
    draw: str
    verifier: str
    nodes: int
    acceptance_length: float
    acceptance: float
    theory: float | None


class RecordingVerifier:
    """Wraps a verifier and records the distributions and outcomes of the first level.

    Args:
        verifier: Verifier that decides.
        keep: Maximum number of pairs of distributions to keep.

    Attributes:
        pairs: Target and drafter distributions over the draft vocabulary and one token for all others.
        overlap: Sum over drafts of Σ min(p, q).
        accepted: Number of drafts whose first level was accepted.
        seen: Number of drafts.
    """

    def __init__(self, verifier: Verifier, keep: int) -> None:
        self._verifier, self._keep, self._calls = verifier, keep, 0
        self.pairs: list[tuple[np.ndarray, np.ndarray]] = []
        self.overlap = self.accepted = self.seen = 0.0

    def refusal(self, kind: DraftKind, chain: bool) -> str | None:
        """Returns why the wrapped verifier cannot verify such drafts, or None if it can."""
        return self._verifier.refusal(kind, chain)

    def __call__(self, probs: torch.Tensor, draft: DraftTree, uniforms: Uniforms) -> Verification:
        """Verifies a draft with the wrapped verifier and records its first level."""
        outcome = self._verifier(probs, draft, uniforms)
        self._calls += 1
        assert draft.probs is not None and draft.vocabulary is not None
        real = draft.lengths > 0
        p, q = probs[:, 0], draft.probs[:, 0]
        ids = draft.vocabulary.expand_as(q) if draft.vocabulary.ndim == 1 else draft.vocabulary[:, 0]
        self.overlap += float(torch.minimum(p.gather(-1, ids), q)[real].sum(dtype=torch.float64))
        self.accepted += float((outcome.accepted[real] > 0).sum())
        self.seen += float(real.sum())
        # one sequence per step, by turns: the first tokens of all sequences would be the easiest
        candidates = real.nonzero()[:, 0].tolist()
        if candidates and len(self.pairs) < self._keep:
            row = candidates[self._calls % len(candidates)]
            rest = 1 - float(p[row, ids[row]].sum(dtype=torch.float64))
            # tokens outside the draft vocabulary become one token without draft probability: neither the
            # verifiers nor the bounds distinguish between them
            target = np.append(p[row, ids[row]].double().numpy(), max(rest, 0.0))
            drafter = np.append(q[row].double().numpy(), 0.0)
            self.pairs.append((target / target.sum(), drafter / drafter.sum()))
        return outcome


CASES = (
    ("eagle3:1", "replacement", "chain"),
    ("eagle3:3", "replacement", "chain"),
    ("eagle3:3", "replacement", "block"),
    ("eagle3:6", "replacement", "chain"),
    ("eagle3:6", "replacement", "block"),
    ("eagle3:2x3/6", "replacement", "recursive"),
    ("eagle3:2x3/6", "replacement", "spectr"),
    ("eagle3:2x3/6", "without_replacement", "recursive"),
    ("eagle3:3x4/12", "replacement", "recursive"),
    ("eagle3:3x4/12", "replacement", "spectr"),
    ("eagle3:3x4/12", "without_replacement", "recursive"),
)


def measure_verifiers(
    bench: RolloutBench,
    batch: str,
    pairs: int,
    candidates: tuple[int, ...],
    log: Log,
    on_row: RowCallback = ignore_row,
) -> tuple[list[VerifierRow], list[BoundRow]]:
    """Measures every verifier in the engine on one workload, then theory and bounds on nodes it met.

    Args:
        bench: Policy, workloads and engines.
        batch: Name of the workload, see `RolloutBench.workloads`; it is decoded twice with different seeds.
        pairs: Number of pairs of distributions that the bounds are averaged over.
        candidates: Numbers of candidates to compute bounds for.
        log: Receives a line per verifier.
        on_row: Called with each row of a verifier once it is measured.
    """
    (w,) = bench.workloads((batch,))
    longest = max(r.params.max_tokens for r in w.timed)
    rows: list[VerifierRow] = []
    met: list[tuple[np.ndarray, np.ndarray]] = []
    likeliest = (("eagle3:6", "chain"), ("eagle3:2x3/6", "tree"), ("eagle3:3x4/12", "tree"))
    for strategy, _ in likeliest:
        engine = bench.engine(w.slots, longest, DraftRules(), ("eagle3",))
        engine.use_strategy(strategy)
        rollouts = engine.generate(w.timed)
        steps = [
            (a, d)
            for r in engine.records
            for a, d in zip(r.feedback.accepted, r.feedback.drafted, strict=True)
            if d
        ]
        first = sum(a > 0 for a, _ in steps) / len(steps)
        nodes = max(d for _, d in steps)
        rows.append(
            VerifierRow(
                strategy, "likeliest", "deterministic", nodes, mean_acceptance_length(rollouts), first, None
            )
        )
        on_row(rows[-1])
    for strategy, draw, name in CASES:
        engine = bench.engine(w.slots, longest, DraftRules("static", draw), ("eagle3",))
        recorder = RecordingVerifier(
            VERIFIERS[name], pairs if (name, strategy) == ("chain", "eagle3:1") else 0
        )
        engine.verify_with(recorder)
        engine.use_strategy(strategy)
        rollouts = [
            r for seed in range(2) for r in engine.generate([replace(q, seed=q.seed + seed) for q in w.timed])
        ]
        nodes = max(max(r.feedback.drafted) for r in engine.records)
        theory = recorder.overlap / recorder.seen if name == "chain" else None
        acceptance = recorder.accepted / recorder.seen
        rows.append(
            VerifierRow(strategy, draw, name, nodes, mean_acceptance_length(rollouts), acceptance, theory)
        )
        on_row(rows[-1])
        met += recorder.pairs
        log(
            f"{strategy:<14} {draw:<20} {name:<10} accepted length {rows[-1].acceptance_length:.3f}  first "
            f"level {acceptance:.4f}"
        )
    return rows, list(_bounds(met, candidates))


def _bounds(pairs: list[tuple[np.ndarray, np.ndarray]], candidates: tuple[int, ...]) -> Iterator[BoundRow]:
    for k in candidates:
        values = [
            (
                deterministic_acceptance(p, q, k),
                chain_acceptance(p, q) if k == 1 else recursive_acceptance(p, q, k, True),
                chain_acceptance(p, q)
                if k == 1
                else recursive_acceptance(p, q, k, False, draws=_RECURSIVE_DRAWS),
                spectr_acceptance(p, q, k),
                optimal_acceptance(p, q, k, True),
                optimal_acceptance(p, q, k, False),
            )
            for p, q in pairs
        ]
        yield BoundRow(k, *(float(np.mean(column)) for column in zip(*values, strict=True)))
